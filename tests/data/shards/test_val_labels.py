"""Classes of a flat validation folder, from a file: in every usual notation, and nothing that does not fit."""

import numpy as np
import pytest

from maedistill.data.shards.sources import open_folder
from maedistill.errors import ConfigError, DataError
from tests.data.shards.image_folders import fill

FLAT = [f"train/{name}/{name}_{i}.png" for name in ("n01", "n02") for i in range(2)] + [
    f"val/ILSVRC2012_val_0000000{i}.png" for i in (1, 2, 3)
]
LABELS = {
    "synsets.txt": "n02\nn01\nn02\n",
    "LOC_val_solution.csv": "ImageId,PredictionString\nILSVRC2012_val_00000003,n02 1 2 3 4 n02 5 6 7 8 \n"
    "ILSVRC2012_val_00000001,n02 1 1 1 1 \nILSVRC2012_val_00000002,n01 1 1 1 1 \n",
    "val.txt": "\ufeffILSVRC2012_val_00000002.JPEG n01\r\nILSVRC2012_val_00000001.JPEG n02\r\n"
    "ILSVRC2012_val_00000003.JPEG n02\r\n",
    "ground_truth.txt": "17\n5\n17\n",
}


@pytest.mark.parametrize("name", LABELS)
def test_a_flat_val_is_refused_at_once_unless_a_file_names_its_classes(tmp_path, name):
    photos = fill(tmp_path / "photos", FLAT)
    with pytest.raises(DataError, match="val has no class folders, but train has: its 3 images") as caught:
        open_folder(photos)
    assert "--val-labels" in caught.value.remedy
    file = tmp_path / name
    file.write_text(LABELS[name], encoding="utf-8")
    if name == "ground_truth.txt":
        with pytest.raises(DataError, match=r"meta\.mat"):
            open_folder(photos, val_labels=str(file))
        io_matlab = pytest.importorskip("scipy.io", reason="needs scipy: pip install 'maedistill[demo]'")
        kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O")]
        table = np.array([(5, "n01", "cat"), (17, "n02", "dog")], dtype=kinds)
        io_matlab.savemat(tmp_path / "meta.mat", {"synsets": table})
    source = open_folder(photos, val_labels=str(file))
    assert [record.label for record in source.splits["val"]] == [1, 0, 1]


@pytest.mark.parametrize("text", ["n02\nn01\n", "n02\nn03\nn01\n", "ILSVRC2012_val_00000001 n01\n", "\x00\x01"])
def test_labels_that_do_not_fit_the_images_are_refused(tmp_path, text):
    (tmp_path / "labels").write_text(text)
    with pytest.raises(DataError):
        open_folder(fill(tmp_path / "photos", FLAT), val_labels=str(tmp_path / "labels"))
    with pytest.raises(ConfigError):  # and where they have no meaning
        open_folder(fill(tmp_path / "others", ["a/1.png"]), val_labels=str(tmp_path / "labels"))


SPACED = ["train/golden/1.png", "train/golden retriever/2.png", "train/n1, n2/3.png"] + [
    f"val/{name}" for name in ("img 1.png", "img 1.jpg", "img.2.png")
]


@pytest.mark.parametrize(
    "text",
    [
        'img 1.jpg,golden retriever\nimg 1.png,golden\nimg.2.png,"n1, n2"\n',
        '"img 1.jpg", "golden retriever"\r\n"img 1.png", "golden"\r\n"val/img.2.png", "n1, n2"\r\n',
        "file;class;by\nimg 1.jpg;golden retriever;me\nimg 1.png;golden;you\nimg.2;n1, n2;\n",
        "img 1.jpg\tgolden retriever\nimg 1.png\tgolden\nimg.2.png\tn1, n2\n",
        "golden retriever\ngolden\nn1, n2\n",  # in the order of the names
    ],
)
def test_names_and_classes_may_hold_blanks_and_commas(tmp_path, text):
    (tmp_path / "labels").write_text(text)
    source = open_folder(fill(tmp_path / "photos", SPACED), val_labels=str(tmp_path / "labels"))
    assert [source.classes[record.label] for record in source.splits["val"]] == ["golden retriever", "golden", "n1, n2"]


@pytest.mark.parametrize(
    "text",
    [
        "img 1,golden\nimg 1,golden retriever\nimg.2.png,golden\n",
        "img 1.jpg,golden\nimg 1.jpg,golden retriever\nimg 1.png,golden\nimg.2.png,golden\n",
        "img 1.jpg,golden fish\nimg 1.png,golden\nimg.2.png,golden\n",
        '"n1, n2"\n"golden, x"\n"n1, n2"\n',
        '"' + "x" * 200_000 + '",golden\n',
    ],
)
def test_labels_that_contradict_each_other_or_name_no_class_are_refused(tmp_path, text):
    (tmp_path / "labels").write_text(text)
    with pytest.raises(DataError):
        open_folder(fill(tmp_path / "photos", SPACED), val_labels=str(tmp_path / "labels"))
