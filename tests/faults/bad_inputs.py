"""The table: every bad or hostile input by name, how a tool is called on it, and how that must end.

Each case runs in a folder of its own, with the files that it names. {good} is the folder of good configs, shards and
runs beside it. A code of 0 is for what is harmless: the cause is then what the tool says.
"""

import itertools
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.faults.corpus import (
    CANARY,
    TINY_EXPORT,
    File,
    Trap,
    bare_pickle,
    bytes_bomb,
    copy_of,
    edit_json,
    edit_weights,
    flip,
    folder,
    header,
    index,
    itself,
    link,
    newest,
    picture,
    png,
    pth,
    samples,
    sparse,
    tar,
    unlabelled,
    weights,
    zip_bomb,
)
from tests.support.checkpoints import renew_manifest


@dataclass(frozen=True)
class Case:
    """A command line with its files, the exit code, and what the lines of cause and remedy name."""

    command: str
    code: int
    cause: str
    remedy: str
    files: dict[str, File]


PRETRAIN, FINETUNE = "pretrain {good}/pretrain.yaml", "finetune {good}/finetune.yaml"
SHARD = f"{PRETRAIN} data.train=bad.tar"
DMAE = f"{PRETRAIN} method=dmae align.student=[1] align.teacher=[1]"
TEACHER = (
    f"{DMAE} teacher.model=vit_tiny_patch16_224 teacher.width=32 teacher.depth=2 teacher.num_heads=2 "
    "teacher.patch_size=8 teacher.source=file:bad"
)
IMAGES, RUN = tar(samples()), copy_of("mae")


def case(command: str, code: int, cause: str, remedy: str = "", **files: File) -> Case:
    """Dots in the names of files are written as __."""
    return Case(command, code, cause, remedy, {name.replace("__", "."): content for name, content in files.items()})


def yaml(cause: str, remedy: str, text: str | bytes) -> Case:
    """A config file."""
    return case("pretrain bad.yaml", 2, cause, remedy, bad__yaml=text)


def shard(cause: str, remedy: str, data: bytes, command: str = SHARD) -> Case:
    """A shard that has no index yet."""
    return case(command, 3, cause, remedy, bad__tar=data)


def image(cause: str, data: bytes) -> Case:
    """A shard of images that cannot be decoded, so that none can take another's place."""
    return shard(f"bad.tar:018: {cause}", "--verify", unlabelled(data))


def odd_image(data: bytes) -> Case:
    """A shard of images that can be decoded, unusual as they are."""
    return case(SHARD, 0, "bad samples: none", bad__tar=unlabelled(data))


def lying_index(cause: str, **changes: object) -> Case:
    """A good shard beside an index that is wrong in one entry."""
    return Case(SHARD, 3, cause, "", {"bad.tar": IMAGES, "bad.index.safetensors": index(**changes)})


def index_file(cause: str, data: bytes) -> Case:
    """A good shard beside a file that is no index."""
    return Case(SHARD, 3, cause, "remove it", {"bad.tar": IMAGES, "bad.index.safetensors": data})


def teacher(cause: str, remedy: str, content: File, suffix: str = ".pth", code: int = 3) -> Case:
    """A weights file as teacher."""
    return Case(TEACHER + suffix, code, cause, remedy, {f"bad{suffix}": content})


def teacher_folder(cause: str, config: str, content: bytes | None = None) -> Case:
    """A folder of timm's as teacher."""
    made = folder(config__json=config, pytorch_model__bin=content or pth(weights()))
    return case(f"{DMAE} teacher.source=local-dir:bad", 3, cause, "", bad=made)


def start(cause: str, change: Callable[[Path], object]) -> Case:
    """A run folder to start fine-tuning from."""
    return case(f"{FINETUNE} init.source=run:bad", 3, cause, "run folder", bad=copy_of("mae", change))


def resumed(cause: str, remedy: str, change: Callable[[Path], object]) -> Case:
    """A run folder to be continued."""
    return case(f"{PRETRAIN} run=bad", 3, cause, remedy, bad=copy_of("mae", change))


def kept_out(out: str, cause: str, code: int = 2, remedy: str = "another --out", **files: File) -> Case:
    """A folder that an export must not touch."""
    return case(f"export {{good}}/mae --out {out}", code, cause, remedy, **files)


def exported(cause: str, change: Callable[[Path], object], code: int = 3) -> Case:
    """A run folder to be exported."""
    return case("export bad", code, cause, "", bad=copy_of("mae", change))


def evaluated(code: int, cause: str, remedy: str, model: File) -> Case:
    """A classifier to be evaluated."""
    return case("evaluate bad {good}/shards/val-*.tar --no-latency", code, cause, remedy, bad=model)


def making(code: int, cause: str, remedy: str, out: File | None = None, **images: File) -> Case:
    """A folder of images to be written as shards."""
    source = folder(**(images or {"a__png": picture()}))
    return case("make_shards bad out --workers 1", code, cause, remedy, bad=source, **({"out": out} if out else {}))


def study(cause: str, remedy: str, text: str, **files: File) -> Case:
    """A study file."""
    return case("study bad.yaml --dry-run", 2, cause, remedy, bad__yaml=text, **files)


LAUGHS = "a: &a [lol, lol]\n" + "".join(f"{b}: &{b} [{f'*{a}, ' * 9}]\n" for a, b in itertools.pairwise("abcdefghi"))
MANY = {f"bad{i}__yaml": f"extends: [{f'bad{i + 1}.yaml, ' * 9}]\n" for i in range(9)} | {"bad9__yaml": "seed: 1\n"}
CONFIGS = {
    "a tag that runs a command": yaml(
        "object/apply:os.mkdir is a YAML tag", "without ! tags", f"run: !!python/object/apply:os.mkdir ['{CANARY}']\n"
    ),
    "a tag on the command line": case(
        f"{PRETRAIN} 'run=!!python/object/apply:os.mkdir [{CANARY}]'", 2, "is a YAML tag", "without ! tags"
    ),
    "a billion laughs": yaml("bad.yaml:2: *a is a YAML alias", "write the value itself", LAUGHS),
    "50,000 brackets": yaml("nested more than 8 deep", "sections and keys", "data: " + "[" * 50_000),
    "a NUL byte": yaml("bad.yaml:2: invalid YAML: the character U+0000", "remove it", b"method: mae\nrun: a\0b\n"),
    "an escaped NUL byte": case(f"{PRETRAIN} 'run=\"a\\0b\"'", 2, "control characters", "one plain line"),
    "a file without end": case("pretrain /dev/zero", 2, "more than 100,000 characters", "which file is meant"),
    "a checkpoint": yaml("bad.yaml cannot be read", "UTF-8", pth({"model": weights()})),
    "a key twice": yaml("bad.yaml:2: run is given twice", "keep one", "run: a\nrun: b\n"),
    "an unknown key": yaml("unknown key optim.epoch", "did you mean optim.epochs?", "optim: {epoch: 3}\n"),
    "a wrong type": yaml("expected a number > 0, or auto, got [3]", "100.0", "optim: {epochs: [3]}\n"),
    "a number of 10,000 digits": case(f"{PRETRAIN} optim.epochs={'9' * 10_000}", 2, "expected a number > 0", "100.0"),
    "files that extend each other": case(
        "pretrain bad.yaml",
        2,
        "bad.yaml -> other.yaml -> bad.yaml",
        "remove",
        bad__yaml="extends: other.yaml\n",
        other__yaml="extends: bad.yaml\n",
    ),
    "a billion files": case("pretrain bad0.yaml", 2, "bad0.yaml extends more than 32 files", "fewer", **MANY),
    "extends a file of the system": yaml(
        "/etc/passwd: a config file is a mapping", "--print-config", "extends: /etc/passwd\n"
    ),
    "extends a device": yaml("there is no file /dev/zero", "one that exists", "extends: /dev/zero\n"),
    "extends a URL": yaml("there is no file https:/a.example/b", "did you mean", "extends: https://a.example/b\n"),
}
PATTERNS = {
    "a pipe": case(f"{PRETRAIN} 'data.train=pipe:mkdir {CANARY}'", 2, "is not an address of shards", "s3://"),
    "a pipe as index": case(f"{PRETRAIN} 'data.index=pipe:mkdir {CANARY}'", 2, "is not an address", "s3://"),
    "words of a shell": case(f"{PRETRAIN} 'data.train=$(mkdir {CANARY}).tar'", 3, "1 of 1 shards are missing", "copy"),
    "ranges that multiply": case(
        f"{PRETRAIN} 'data.train=a-{'{{0..999}}' * 4}.tar'",
        2,
        "expands to 1,000,000,000 shards or more",
        "at most 1,000,000",
    ),
    "a shard twice": case(
        f"{PRETRAIN} 'data.train=\"{{{{bad,bad}}}}.tar\"'", 2, "bad.tar twice", "once", bad__tar=IMAGES
    ),
}
TARS = {
    "cut inside a member": shard("is cut inside", "copy or write this shard again", IMAGES[:3000]),
    "gzip": shard("bad.tar is compressed", "decompress it", tar(samples(), mode="w:gz")),
    "a zip": shard("bad.tar is not a tar", "copy or write", pth({})),
    "a symbolic link": shard("'000.png' is a link", "plain files only", tar(samples(), kind=b"2")),
    "a name that climbs": shard(f"'{CANARY}/a.png' leads out", "do not use", tar({f"{CANARY}/a.png": picture()})),
    "a key twice": shard(
        "the key 'a' occurs twice", "unique keys", tar([("a.png", b""), ("b.png", b""), ("a.png", b"")])
    ),
    "two images of a key": shard(
        "'a' has 2 images: jpg, png", "data.image_key=jpg", tar([("a.png", b""), ("b.png", b""), ("a.jpg", b"")])
    ),
    "a name of two lines": shard(
        r"'a\nerror: b' has 2 images", "data.image_key", tar({"a\nerror: b.png": b"", "a\nerror: b.jpg": b""})
    ),
    "a label without image": shard("'x' has a label but no image", "must end in", tar(samples() | {"x.cls": b"1"})),
    "a pickle and a .pyd among images": case(
        SHARD,
        0,
        "never opened: {'.pkl': 1, '.pyd': 1}",
        bad__tar=tar(samples() | {"a.pkl": bare_pickle(Trap()), "a.pyd": b"MZ"}),
    ),
}
LABELS = {
    name: shard(
        ".cls' holds b'",
        "a label is one number from 0 to 999999",
        tar(samples(label=text)),
        f"{FINETUNE} data.train=bad.tar",
    )
    for name, text in {"a word": b"cat", "a pickle": bare_pickle(Trap())}.items()
} | {
    "missing": shard(
        "20 of 20 samples have no label", "labelled shards", unlabelled(picture()), f"{FINETUNE} data.train=bad.tar"
    ),
    "without output": case(f"{FINETUNE} data.num_classes=2", 2, "2 outputs for labels up to 2", "use 3 or more"),
    "without class name": case(
        SHARD,
        3,
        "'002' has the label 2, but classes.json names 2",
        "or remove it",
        bad__tar=IMAGES,
        classes__json='["a", "b"]',
    ),
    "classes that are no names": case(
        SHARD, 3, "not a list of names", '["name', bad__tar=IMAGES, classes__json="[1, 2]"
    ),
    "classes nested deep": case(
        SHARD, 3, "classes.json is not JSON", "or remove it", bad__tar=IMAGES, classes__json="[" * 100_000
    ),
}
LIAR = "is not an index of format 1"
INDEXES = {
    "another format": lying_index(LIAR, format=9),
    "offsets beyond the shard": lying_index(LIAR, offsets=lambda a: a + (1 << 40)),
    "another size": lying_index("bad.tar has 51,200 bytes instead of 10,240,000", shard_bytes=[10_240_000]),
    "another shard's name": lying_index("bad.tar is not in the index", shards=["other.tar"]),
    "a name that climbs": lying_index(LIAR, shards=["../../bad.tar"]),
    "a header beyond the file": index_file(LIAR, header({}, length=1 << 62)),
    "a pickle": index_file(LIAR, bare_pickle(Trap())),
    "missing": case(f"{PRETRAIN} data.index=none", 3, "the index none does not exist", "leave data.index out"),
    "of other shards": case(
        f"{SHARD} data.index={{good}}/shards/train.index.safetensors",
        3,
        "bad.tar is not in the index",
        "only shards of",
        bad__tar=IMAGES,
    ),
}
UNKNOWN = "no JPEG, PNG, WEBP file"
PICTURES = {
    "zero bytes": image(UNKNOWN, b""),
    "half a JPEG": image("", picture("JPEG")[:300]),
    "a bomb of 3,600 megapixels": image("", png(60_000, 60_000)),
    "a bomb of 64 megapixels": image("8001 x 8000 pixels, more than 64,000,000", png(8001, 8000)),
    "a GIF": image(UNKNOWN, picture("GIF")),
    "a PostScript program": image(UNKNOWN, f"%!PS-Adobe-3.0 EPSF-3.0\n({CANARY}) (w) file closefile\n".encode()),
    "a pickle": image(UNKNOWN, bare_pickle(Trap())),
    "16 bits": odd_image(png(32, 32, depth=16, rows=(b"\0" + bytes(32 * 6)) * 32)),
    "a JPEG named .png": odd_image(picture("JPEG")),
    "one bad among good": case(
        SHARD, 0, "bad.tar:018: no JPEG, PNG, WEBP file", bad__tar=unlabelled(picture(), last=b"")
    ),
}
UNREADABLE, PLAIN = "cannot be read as plain weights", "plain values (pickled objects are refused)"
DEEP = TINY_EXPORT.replace('"depth": 2', '"depth": 1000000000')
SOURCES = {
    "a pickle that runs code": teacher("posix.mkdir", PLAIN, pth({"model": weights(), "more": Trap()})),
    "an old pickle that runs code": teacher(
        "posix.mkdir", PLAIN, pth({"model": weights(), "more": Trap()}, zipped=False)
    ),
    "a bare pickle that runs code": teacher("posix.mkdir", PLAIN, bare_pickle(Trap())),
    "a pickle of 4 TB": teacher("MemoryError", PLAIN, bytes_bomb()),
    "a zip that would unpack to 200 MB": teacher("that would unpack to", PLAIN, zip_bomb),
    "safetensors of an exabyte": teacher(
        UNREADABLE,
        PLAIN,
        header({"a": {"dtype": "F32", "shape": [1 << 60], "data_offsets": [0, 1 << 62]}}),
        ".safetensors",
    ),
    "safetensors with a header beyond the file": teacher(UNREADABLE, PLAIN, header({}, length=1 << 63), ".safetensors"),
    "empty": teacher("bad.pth: it is empty", "download", b""),
    "a web page": teacher("it is a web page", "download", b"<!DOCTYPE html>\n<html>404 Not Found</html>"),
    "a pointer of Git LFS": teacher(
        "a pointer of Git LFS", "download", b"version https://git-lfs.github.com/spec/v1\n", ".safetensors"
    ),
    "no weights": teacher("holds no tensors", "state dict", pth({"model": {"epoch": 3}})),
    "a mapping that holds itself": teacher("holds no tensors", "state dict", pth(itself())),
    "a wrong shape": teacher(
        "norm1.weight is (3,)", "dimensions", pth(weights(blocks__1__norm1__weight=torch.ones(3)))
    ),
    "a missing key": teacher("1 keys are missing", "dimensions", pth(weights(blocks__1__norm1__weight=None))),
    "a foreign key": teacher("e.g. rope.freqs", "depth", pth(weights(rope__freqs=torch.ones(3)))),
    "a key that clears the screen": teacher(
        r"e.g. a\nerror: b\x1b[2J", "depth", pth(weights() | {"a\nerror: b\x1b[2J" + "c" * 10_000: torch.ones(3)})
    ),
    "another width": case(
        f"{TEACHER}.pth teacher.width=64",
        3,
        "is (1, 1, 32), the model expects (1, 1, 64)",
        "dimensions",
        bad__pth=pth(weights()),
    ),
    "NaN": teacher(
        "1 of 32 values of norm.bias are not finite",
        "diverged",
        pth(weights(norm__bias=torch.tensor([0.0] * 31 + [torch.nan]))),
    ),
    "beyond fp32": teacher(
        "are not finite", "diverged", pth(weights(norm__bias=torch.full((32,), 1e300, dtype=torch.float64)))
    ),
    "whole numbers": teacher(
        "holds torch.int64", "weights", pth(weights(norm__bias=torch.ones(32, dtype=torch.int64)))
    ),
    "sparse": teacher(
        "norm.bias is not a plain tensor", "to_dense", pth(weights(norm__bias=torch.ones(32).to_sparse()))
    ),
    "no numbers at all": teacher("holds no numbers", "weights", pth(weights(norm__bias=torch.ones(32, device="meta")))),
    "a bias of 4 TB": teacher(
        "q_bias is not a plain tensor of (1099511627776,)",
        "clone",
        pth(weights(blocks__0__attn__q_bias=torch.ones(1).expand(1 << 40))),
    ),
    "a number for AMD's tokens": teacher(
        "bad samples: none", "", pth({"model": weights(), "generator_mask_tokens": 3}), code=0
    ),
    "a folder": case(f"{TEACHER.removesuffix('bad')}.", 3, ".: a folder, not a file", "local-dir:PATH"),
    "a name that is too long": case(f"{TEACHER}{'a' * 5000}", 3, "no such file", "path"),
    "the home of nobody": case(f"{TEACHER.removesuffix('bad')}~nobody-here/a", 3, "no such file", "path"),
    "timm's folder with a pickle": teacher_folder(
        "non-allowlisted pickle globals", TINY_EXPORT, pth({"model": weights(), "more": Trap()})
    ),
    "timm's folder of 1,000,000,000 blocks": teacher_folder("depth is 1000000000, more than 1,000", DEEP),
    "timm's folder with words as mean": teacher_folder(
        "gives its images impossible values: mean",
        TINY_EXPORT.replace('"pretrained_cfg": {', '"pretrained_cfg": {"mean": "dark", '),
    ),
    "timm's folder without architecture": teacher_folder("'architecture'", '{"num_classes": 0}'),
    "timm's folder cut": teacher_folder("JSONDecodeError", '{"num_classes"'),
}
STARTS = {
    "without checkpoints": start("bad holds no checkpoint", lambda run: shutil.rmtree(run / "checkpoints")),
    "without its record": start("its run.json is not there", lambda run: (run / "run.json").unlink()),
    "its record nested deep": start(
        "run.json cannot be read", lambda run: (run / "run.json").write_text("[" * 100_000)
    ),
    "its record a list": start("no JSON object", lambda run: (run / "run.json").write_text('["stage"]')),
    "a text as network": start("is not valid: network", edit_json("run.json", network="vit")),
    "a network that timm has not": start(
        "timm has no model 'vit_tinny'", edit_json("run.json", network__name="vit_tinny")
    ),
    "a network from elsewhere": start(
        "timm has no model 'local-dir:.'", edit_json("run.json", network__name="local-dir:.")
    ),
    "a network of 1,000,000,000 blocks": start(
        "depth is 1000000000, more", edit_json("run.json", network__arguments__depth=10**9)
    ),
    "a network of a terabyte": start(
        "embed_dim is 100000, but the largest", edit_json("run.json", network__arguments__embed_dim=100_000)
    ),
    "a network that loads a pickle": start(
        "'checkpoint_path' is no part of a network",
        edit_json("run.json", network__arguments__checkpoint_path="bad.pth"),
    ),
    "words as mean": start("is not valid: input.mean", edit_json("run.json", input__mean="dark")),
    "weights that are NaN": case(
        f"{FINETUNE} init.source=run:bad",
        3,
        "are not finite",
        "diverged",
        bad=copy_of("mae", edit_weights("model.safetensors", lambda t: {n: v * torch.nan for n, v in t.items()})),
    ),
}
INTACT, RESTORE = "no checkpoint in bad/checkpoints is intact: step_000000001", "restore one from a copy"
CHECKPOINTS = {
    "a flipped bit": resumed(INTACT, RESTORE, flip("model.safetensors", 3000)),
    "of another model": resumed(
        "belongs to another model",
        "settings",
        edit_weights("model.safetensors", lambda t: {f"x{n}": v for n, v in t.items()}),
    ),
    "a pickle as moments": resumed(
        "optimizer.safetensors cannot be used",
        "another checkpoint",
        lambda run: (
            (newest(run) / "optimizer.safetensors").write_bytes(bare_pickle(Trap())),
            renew_manifest(newest(run)),
        ),
    ),
}
RUNS = {
    "other settings": case(
        f"{PRETRAIN} run=bad optim.lr=1e-3", 2, "optim.lr: 0.003 there, 0.001 now", "restore", bad=RUN
    ),
    "other data": case(
        f"{SHARD} run=bad", 2, "was trained on other data (48 images", "same shards", bad__tar=IMAGES, bad=RUN
    ),
    "another stage": case(
        f"{FINETUNE} run=bad", 2, "a run of pre-training, not of fine-tuning", "another run=", bad=RUN
    ),
    "held already": case(f"{PRETRAIN} run=bad --fresh", 2, "no terminal to ask on", "--yes", bad=RUN),
    "deleting nothing": case(f"{PRETRAIN} run=bad --yes", 2, "--yes only answers", "add --fresh"),
    "over and on": case(f"{PRETRAIN} run=bad --fresh --extend", 2, "--extend does not", "leave out", bad=RUN),
    "fewer epochs": case(
        f"{PRETRAIN} run=bad optim.epochs=2 --extend", 2, "2 is less than the 3", "only adds", bad=RUN
    ),
    "a file in its place": case(f"{PRETRAIN} run=bad", 2, "run: bad cannot be written to", "another run=", bad="mine"),
    "where nobody may write": case(f"{PRETRAIN} run=/proc/maedistill", 2, "cannot be written to", "another run="),
    "settings with a tag": case(
        f"{PRETRAIN} run=bad",
        2,
        "is a YAML tag",
        "",
        bad=copy_of(
            "mae", lambda run: (run / "config.yaml").write_text(f"run: !!python/object/apply:os.mkdir ['{CANARY}']")
        ),
    ),
    "settings gone": case(
        f"{PRETRAIN} run=bad",
        0,
        "bad/config.yaml is gone, and no checkpoint has a copy",
        "",
        bad=copy_of("mae", lambda run: (run / "config.yaml").unlink()),
    ),
}
OTHERS = {"bad": folder(thesis__tex="years")}
EXPORTS = {
    "a link to it": kept_out("link", "(thesis.tex)", **OTHERS, link=link("bad")),
    "a way around": kept_out("new/../bad", "(thesis.tex)", **OTHERS),
    "this folder by a way around": kept_out("new/..", "is the working directory", thesis__tex="years"),
    "no name": kept_out("''", "is the working directory"),
    "the run itself": kept_out("{good}/mae", "(checkpoints, config.yaml, run.json)"),
    "a file": kept_out("bad", "something other", bad="years"),
    "a folder of others under the temporary name": kept_out(
        "new", "new.tmp is in the way", 3, new__tmp=folder(thesis__tex="years")
    ),
    "a folder of others under the name for the old one": kept_out(
        "new", "new.old.tmp is in the way", 3, new__old__tmp=folder(thesis__tex="years")
    ),
    "below a file": kept_out("bad/export", "cannot be written", 3, bad="years"),
    "of a run with settings of tags": exported(
        "is a YAML tag", lambda run: (run / "config.yaml").write_text("run: !!python/none"), 2
    ),
    "of a run with other metrics": exported(
        "metrics.jsonl cannot be read", lambda run: (run / "metrics.jsonl").write_text("a}\n")
    ),
    "of a run with numbers for metrics": exported(
        "not all lines say their step", lambda run: (run / "metrics.jsonl").write_text("{}\n")
    ),
    "of a run with a mapping as license": exported("is not valid: license", edit_json("run.json", license={"a": 1})),
    "of a run by an unknown method": exported("is not valid: method", edit_json("run.json", method="magic")),
    "of no run": case("export bad", 3, "holds no run of this version", "run folder", **OTHERS),
    "averages that nobody kept": case("export {good}/mae --ema", 3, "kept no moving average", "leave out --ema"),
}
MODELS = {
    "an encoder": case("evaluate {good}/mae {good}/shards/val-*.tar", 2, "has no classifier", "fine-tune it"),
    "no model": evaluated(2, "'bad' is neither a run", "maedistill pretrain, finetune", folder(thesis__tex="years")),
    "a record cut": evaluated(
        3, "run.json cannot be read", "run folder", copy_of("tuned", lambda run: (run / "run.json").write_text("{"))
    ),
    "a pickle": evaluated(
        3,
        "pickle globals",
        "config.json",
        folder(
            config__json=TINY_EXPORT.replace('"num_classes": 0', '"num_classes": 3'),
            pytorch_model__bin=pth({"more": Trap()}),
        ),
    ),
    "1,000,000,000 blocks": evaluated(3, "depth is 1000000000", "config.json", folder(config__json=DEEP)),
    "labels beyond the head": case(
        "evaluate {good}/tuned bad.tar --no-latency --workers 0",
        3,
        "the model has 3 classes",
        "fine-tune it",
        bad__tar=tar(samples(label=b"77")),
    ),
    "an image that is none": case(
        "evaluate {good}/tuned bad.tar --no-latency --workers 0",
        3,
        "20 of 20 images",
        "repair",
        bad__tar=tar(samples(image=b"")),
    ),
}
MAKING = {
    "no images": making(3, "bad holds no images", ".jpg", a__txt="x"),
    "only bad images": making(
        3, "not one image of 'train' can be used", "SRC", a__png=b"x", b__png=png(60_000, 60_000)
    ),
    "a link to a folder above": making(
        3, "is a link to a folder above it", "remove", a=folder(a__png=picture(), again=link(".."))
    ),
    "a named pipe": making(3, "a.png: it is no file", "SRC", a__png=lambda path, good: os.mkfifo(path)),
    "an image of a terabyte": making(3, "a.png: 1,099,511,627,776 bytes", "SRC", a__png=sparse(1 << 40)),
    "a folder of others": making(2, "out is not empty", "new or empty", folder(thesis__tex="years")),
    "a report cut": making(
        2, "make_shards.json is not what make_shards writes", "another OUT", folder(make_shards__json="{")
    ),
    "an index to verify that is none": case(
        "make_shards --verify bad", 3, LIAR, "remove it", bad=folder(train__index__safetensors=bare_pickle(Trap()))
    ),
}
STUDENT = "out: out\nseeds: [0]\nstudents: {{{name}: {{config: {config}}}}}\nfinetune: {{config: finetune.yaml}}\n"
STUDIES = {
    "a tag": study("is a YAML tag", "without ! tags", f"out: !!python/object/apply:os.mkdir ['{CANARY}']\n"),
    "no YAML": study("bad.yaml:2: invalid YAML", "correct it", "out: [\n"),
    "a student that climbs": study("dots are for the command line", "", STUDENT.format(name=CANARY, config="a.yaml")),
    "a student that is nowhere": study(
        "there is no config file none.yaml", "", STUDENT.format(name="a", config="none.yaml"), finetune__yaml="run: a\n"
    ),
    "students as a list": study(
        "students", "cifar10/study_methods", "out: out\nseeds: [0]\nstudents: [a]\nfinetune: {config: a}\n"
    ),
}
FINE = {
    "pre-training": case(PRETRAIN, 0, "bad samples: none"),
    "distillation": teacher("bad samples: none", "", pth(weights()), code=0),
    "distillation from timm's folder": case(
        f"{DMAE} teacher.source=local-dir:bad",
        0,
        "bad samples: none",
        bad=folder(config__json=TINY_EXPORT, pytorch_model__bin=pth(weights())),
    ),
    "fine-tuning": case(f"{FINETUNE} init.source=run:bad", 0, "bad samples: none", bad=RUN),
    "a run continued": case(f"{PRETRAIN} run=bad", 0, "bad samples: none", bad=RUN),
    "an index": case(SHARD, 0, "bad samples: none", bad__tar=IMAGES, bad__index__safetensors=index()),
    "export": case("export {good}/mae --out out", 0, "exported step_000000001"),
    "evaluation": case("evaluate {good}/tuned {good}/shards/val-*.tar --no-latency --workers 0", 0, "top-1"),
    "shards": making(0, "train: 1 images", ""),
}
GROUPS = {
    "config": CONFIGS,
    "pattern": PATTERNS,
    "tar": TARS,
    "label": LABELS,
    "index": INDEXES,
    "image": PICTURES,
    "weights": SOURCES,
    "start": STARTS,
    "checkpoint": CHECKPOINTS,
    "run folder": RUNS,
    "export": EXPORTS,
    "model": MODELS,
    "making shards": MAKING,
    "study": STUDIES,
    "nothing wrong": FINE,
}
CASES = {f"{group}: {name}": entry for group, cases in GROUPS.items() for name, entry in cases.items()}
