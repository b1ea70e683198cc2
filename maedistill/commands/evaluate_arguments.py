"""The command line of `maedistill evaluate`, in each of its forms."""

import argparse

from maedistill.commands.arguments import PEER, at_least, new_parser, path, positive, several, share

EXAMPLES = """\
MODEL is the folder of a run or of an export, or timm:NAME, or hf-hub:ID, or the file of an exported graph: onnx:FILE,
torch_export:FILE. SHARDS is a folder of shards (its val-*.tar) or a pattern. Image size, crop and normalisation are the
model's own.

examples:
  maedistill evaluate runs/dmae_s_finetuned 'in1k/val-*.tar'
  maedistill evaluate runs/dmae_s_finetuned/export 'in1k/val-*.tar' --per-class classes.csv --confusions worst.png
  maedistill evaluate timm:vit_small_patch16_224 'in1k/val-*.tar' --real --json result.json
  maedistill evaluate timm:vit_small_patch16_224 'imagenet-r/*.tar' --subset
  maedistill evaluate runs/dmae_s_finetuned 'in1k/val-*.tar' --against timm:vit_large_patch16_224
  maedistill evaluate onnx:runs/dmae_s_finetuned/export/model.onnx 'in1k/val-*.tar' --against runs/dmae_s_finetuned
  torchrun --nproc-per-node 8 -m maedistill evaluate MODEL SHARDS

frozen features of any network, a pre-training run too (each with a --help of its own):
  maedistill evaluate knn runs/dmae_s --train 'in1k/train-*.tar' --val 'in1k/val-*.tar' --k 10,20
  maedistill evaluate probe runs/dmae_s --train 'in1k/train-*.tar' --val 'in1k/val-*.tar' --block 8
features on disk, and linear segmentation of patch features:
  maedistill evaluate embed runs/dmae_s 'in1k/train-*.tar' features/dmae_s
  maedistill evaluate segment runs/dmae_s --images scenes/images --masks scenes/masks
the exits of a run with student.exits:
  maedistill evaluate exits runs/dmae_s_exits 'in1k/val-*.tar' --picture exits.png --beside runs/small runs/tiny

The counts are the same for any number of processes. Exit codes: 0 done, 2 usage, 3 data, 4 numerics, 5 a peer or the
hardware.
"""
ABOUT = {
    "score": "Evaluate a network on labelled shards: every image exactly once.",
    "knn": "Classify each image by a vote of its nearest training images (cosine similarity).",
    "probe": "Train a linear classifier on frozen features, at several learning rates in one pass.",
    "embed": "Write the features of every image to files. After an interruption the same command continues.",
    "segment": "Train a linear layer on frozen patch features to segment photographs, and score it by mIoU.",
    "exits": "Evaluate the exits of a run: each alone, their ensemble, and thresholds on their confidence.",
}
FEATURES = """\
MODEL is the folder of a run of either stage or of an export, or timm:NAME, or hf-hub:ID. Its features are the mean of
the patch tokens after the final norm (of a convolutional network: the map as its own head pools it), or, with --block,
the mean of that block's output.

The counts are the same for any number of processes (torchrun --nproc-per-node N -m maedistill evaluate ...).
"""
EXITS = """\
RUN is a folder that maedistill finetune has written with student.exits. An image leaves at the first exit whose largest
probability reaches the threshold, or at the final classifier. The latencies of all of them are measured in turn.
"""
EMBED = """\
OUT gets features-000000.safetensors and so on, with ids (positions in the shards, as in --predictions), features and,
if there are any, labels; and manifest.json. Without --block, features are the network's final output.

The bytes are the same for any number of processes (torchrun --nproc-per-node N -m maedistill evaluate embed ...).
"""
SEGMENT = """\
MODEL is the folder of a run of either stage or of an export, or timm:NAME, or hf-hub:ID: any network of timm that gives
feature maps. Images are .jpg or .png, masks .png files of the same names whose pixels are class numbers. Each image is
resized to the network's size without keeping its proportions; scores count the pixels of the masks at their own size.

The best learning rate is chosen on a tenth of the training images, never on the validation images. For ADE20k:
  maedistill evaluate segment MODEL --images images/training --masks annotations/training --ignore 0
      --val-images images/validation --val-masks annotations/validation
"""
FILES = {
    "predictions": "write each image's label, loss and five best classes",
    "per_class": "write each class's counts, confidence and what it is most often taken for",
    "confusions": "draw the classes that are most often confused, with images",
    "json": "write the result: accuracies as fractions, and counts",
}
THREADS = "default: its cores"  # of --threads
SUFFIXES = {"predictions": ".csv", "per_class": ".csv", "confusions": ".png", "json": ".json"}


def parse_score(words: list[str]) -> argparse.Namespace:
    """Read the command line for a classifier."""
    parser = new_parser("maedistill evaluate", ABOUT["score"], EXAMPLES)
    add = parser.add_argument
    add("model", metavar="MODEL", help="a run, an export or the graph of one, or timm:NAME, hf-hub:ID")
    add(
        "shards",
        metavar="SHARDS",
        help="labelled shards: a folder (its val-*.tar), one tar, a quoted glob or a brace range",
    )
    add("--index", metavar="FILE", help="the shards' index, if it is not in their folder")
    add("--exit", type=int, metavar="BLOCK", help="the network that ends at an exit (a run with student.exits)")
    add("--peer", type=int, default=0, metavar="N", help=PEER)
    add("--against", metavar="MODEL2", help="compare with another classifier's predictions: same best class, KL")
    labels = parser.add_mutually_exclusive_group().add_argument
    labels("--subset", action="store_true", help="the shards hold some of the model's classes: match them by name")
    labels("--real", action="store_true", help="ImageNet's validation set: count against ImageNet-ReaL's labels, too")
    for name, text in FILES.items():
        flag = "--" + name.replace("_", "-")
        add(flag, type=path, metavar=f"FILE{SUFFIXES[name]}", dest=name, help=text)
    add("--test-size", action="store_true", help="image size and crop of timm's published accuracy, if they differ")
    add("--no-latency", action="store_true", help="do not time the network")
    add_common(parser)
    return parser.parse_args(words)


def parse_features(command: str, words: list[str]) -> argparse.Namespace:
    """Read the command line for frozen features: `knn` or `probe`."""
    parser = new_parser(f"maedistill evaluate {command}", ABOUT[command], FEATURES)
    add = parser.add_argument
    add("model", metavar="MODEL", help="a run, an export or a weights file, or timm:NAME, hf-hub:ID")
    for split, use in (("train", "to learn from"), ("val", "to score on")):
        add(f"--{split}", metavar="SHARDS", required=True, help=f"labelled shards {use}")
        add(f"--{split}-index", metavar="FILE", help="their index, if it is not in their folder")
    add("--block", type=int, metavar="N", help="block to use: from 0, or from -1 backwards (default: the final output)")
    add("--pool", choices=("mean", "class"), default="mean", help="mean of the patches, or the class token")
    if command == "knn":
        add(
            "--k",
            type=several(at_least(1)),
            default=[10, 20, 100, 200],
            metavar="N,N",
            help="neighbours (default 10,20,100,200)",
        )
        add(
            "--temperature", type=positive, default=0.07, metavar="T", help="votes weigh exp(cosine / T) (default 0.07)"
        )
    else:
        rates = [0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0]
        add(
            "--lr",
            type=several(positive),
            default=rates,
            metavar="X,X",
            help="learning rates per 256 images, in one pass (default 0.03 to 30)",
        )
        add("--epochs", type=at_least(1), default=90, metavar="N", help="epochs over the features (default 90)")
        update = "training images in one update of the classifiers (default 4096; at most a quarter of all)"
        add("--head-batch", type=at_least(2), default=4096, metavar="N", help=update)
        add("--optimizer", choices=("lars", "sgd"), default="lars", help="without weight decay (default lars)")
    add("--json", type=path, metavar="FILE.json", help=FILES["json"])
    add_common(parser)
    parser.set_defaults(command=command)
    return parser.parse_args(words)


def parse_embed(words: list[str]) -> argparse.Namespace:
    """Read the command line for features on disk."""
    parser = new_parser("maedistill evaluate embed", ABOUT["embed"], EMBED)
    add = parser.add_argument
    add("model", metavar="MODEL", help="a run, an export or a weights file, or timm:NAME, hf-hub:ID")
    add("shards", metavar="SHARDS", help="shards: a folder (its val-*.tar), one tar, a quoted glob or a brace range")
    add("out", metavar="OUT", type=path, help="a new folder, or one that this command began to fill")
    add("--index", metavar="FILE", help="the shards' index, if it is not in their folder")
    add("--block", type=int, metavar="N", help="block to use: from 0, or from -1 backwards (default: the final output)")
    kinds = parser.add_mutually_exclusive_group().add_argument
    kinds("--pool", choices=("mean", "class"), default="mean", help="mean of the patches, or the class token")
    kinds("--patches", action="store_true", help="the map of patch features, [h, w, D], instead of one vector")
    add("--per-file", type=at_least(1), metavar="N", help="images per file (default 10,000, and 500 with --patches)")
    add_common(parser, threads="default 1: the number of threads changes the rounding")
    parser.set_defaults(threads=1)
    return parser.parse_args(words)


def parse_segment(words: list[str]) -> argparse.Namespace:
    """Read the command line for linear segmentation."""
    parser = new_parser("maedistill evaluate segment", ABOUT["segment"], SEGMENT)
    add = parser.add_argument
    add("model", metavar="MODEL", help="a run, an export or a weights file, or timm:NAME, hf-hub:ID")
    add("--images", type=path, metavar="DIR", required=True, help="training images")
    add("--masks", type=path, metavar="DIR", required=True, help="their masks")
    add("--val-images", type=path, metavar="DIR", help="images to score on (default: the held-out training images)")
    add("--val-masks", type=path, metavar="DIR", help="their masks")
    add("--classes", type=at_least(1), metavar="N", help="number of classes (default: the largest in the masks + 1)")
    add("--ignore", type=at_least(0), default=255, metavar="N", help="value that is not a class (default 255)")
    blocks = "blocks whose outputs are concatenated: --blocks=-2,-1 (default: the final output)"
    add("--blocks", type=several(int), metavar="N,N", help=blocks)
    rates = [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1]
    add("--lr", type=several(positive), default=rates, metavar="X,X", help="learning rates (default 0.0003 to 0.1)")
    add("--epochs", type=at_least(1), default=20, metavar="N", help="epochs over the features (default 20)")
    update = "training images in one update of the layer (default 16; at most a quarter of all)"
    add("--head-batch", type=at_least(2), default=16, metavar="N", help=update)
    add("--image-size", type=at_least(1), metavar="N", help="if not the model's own; positions are resampled")
    add("--picture", type=path, metavar="FILE.png", help="draw some images, masks and predictions")
    add("--json", type=path, metavar="FILE.json", help=FILES["json"])
    add_execution(parser)
    arguments = parser.parse_args(words)
    if (arguments.val_images is None) != (arguments.val_masks is None):
        parser.error("--val-images and --val-masks need each other")
    if arguments.ignore > 255:
        parser.error(f"--ignore: {arguments.ignore} is no number of 8 bits, 0 to 255")
    if arguments.classes is not None and arguments.classes > 256:
        parser.error(f"--classes: masks of 8 bits have at most 256 classes, not {arguments.classes}")
    return arguments


def parse_exits(words: list[str]) -> argparse.Namespace:
    """Read the command line for the exits of a run."""
    parser = new_parser("maedistill evaluate exits", ABOUT["exits"], EXITS)
    add = parser.add_argument
    add("model", metavar="RUN", help="a fine-tuned run with student.exits")
    add("shards", metavar="SHARDS", help="labelled shards: a folder (its val-*.tar), one tar, or a quoted glob")
    add("--index", metavar="FILE", help="the shards' index, if it is not in their folder")
    about_beside = "other networks to draw, such as separately trained sizes"
    add("--beside", action="extend", nargs="+", default=[], metavar="MODEL", help=about_beside)
    add("--picture", type=path, metavar="FILE.png", help="draw top-1 over mean latency")
    add("--json", type=path, metavar="FILE.json", help=FILES["json"])
    add_execution(parser)
    return parser.parse_args(words)


def add_common(parser: argparse.ArgumentParser, *, threads: str = THREADS) -> None:
    """Add the arguments of images, and those of `add_execution`. threads: the default of --threads, in words."""
    add = parser.add_argument
    add("--image-size", type=at_least(1), metavar="N", help="if not the model's own; positions are resampled")
    add("--crop", type=share, metavar="F", help="share of the shorter side that is seen, if not the model's own")
    add("--image-key", metavar="FIELD", help="member of a sample that is its image, as data.image_key")
    add("--label-key", metavar="FIELD", help="member of a sample that is its label, as data.label_key")
    add("--exif", choices=("ignore", "apply"), help="turn photographs upright or not (default: as the run did)")
    add_execution(parser, threads=threads)


def add_execution(parser: argparse.ArgumentParser, *, threads: str = THREADS) -> None:
    """Add the arguments that every form of the tool takes. threads: see `add_common`."""
    add = parser.add_argument
    add("--weights", default="model", metavar="NAME", help="ema, or the entry of a checkpoint file that holds several")
    average = "the moving average of the weights of a run or a checkpoint file, as --weights ema"
    add("--ema", dest="weights", action="store_const", const="ema", help=average)
    add(
        "--batch",
        type=at_least(1),
        default=64,
        metavar="N",
        help="images through the network at once in each process (default 64)",
    )
    formats = "auto: bf16 on a GPU (fp16 below compute capability 8.0), fp32 on a CPU"
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help=formats)
    add(
        "--workers",
        type=at_least(0),
        metavar="N",
        help="decoding workers of each process (default: its cores, at most 8)",
    )
    add("--threads", type=at_least(1), metavar="N", help=f"torch's CPU threads in each process ({threads})")
