"""The accuracy of every format of an export, against the run's network, on the same shards.

RUN, OUT, SHARDS -> require_scorable, before the export -> score_formats, after it -> OUT/scorecard_FORMAT.json
"""

from pathlib import Path
from typing import Any

import torch

from maedistill.data.loading.evaluation import EvaluationImages
from maedistill.data.shards.open_index import open_index
from maedistill.escaping import say
from maedistill.evaluation.accuracy import require_known_classes
from maedistill.evaluation.context import EvalContext, finish
from maedistill.evaluation.scorecard import ScoreSpec, score
from maedistill.exporting.folder import NETWORK_FILES, read_record
from maedistill.weights.class_names import compare_names
from maedistill.weights.from_run import run_members
from maedistill.weights.open_network import open_network, unloaded_run


def require_scorable(run: str | Path, val: str, *, calibration: str | None = None) -> None:
    """Raise errors that would otherwise come late: for missing shards, or labels that the run does not know.

    calibration: shards for int8, whose labels do not matter. A run without a classifier is left to `export`.
    """
    network, members = unloaded_run(run), run_members(run)
    index = open_index(val, split="val", members=members)
    if calibration is not None:
        open_index(calibration, split="train", members=members)
    if network.num_classes:
        index.require_labels()
        images = EvaluationImages(index, torch.arange(len(index)), network.transform())
        require_known_classes(images, network.num_classes)
        compare_names(network.classes, index.classes, num_known=network.num_classes, model=network.name)


def score_formats(out: Path, run: str | Path, val: str, context: EvalContext, **part: Any) -> None:
    """Evaluate every format of an export on `val`, each against the run's network; write scorecard_FORMAT.json.

    part: weights, exit, peer, as in `export`. Members of samples and EXIF are those of the run. The scorecards name the
    networks without the folders of this machine.
    """
    network, members = open_network(f"run:{run}", "classifier", **part), run_members(run)
    name_of_run = read_record(out)["run"]
    for name, file in NETWORK_FILES.items():
        if not (out / file).is_file():
            continue
        kind = "torch_export" if name == "torch_export" else "onnx"
        source = f"local-dir:{out}" if name == "timm" else f"{kind}:{out / file}"
        say("", name)
        spec = ScoreSpec(source, val, members=members, exif=network.exif, against=network)
        result = score(spec, context, files={})
        finish(result | {"model": f"{name_of_run} {name}", "vs": name_of_run}, out / f"scorecard_{name}.json")
