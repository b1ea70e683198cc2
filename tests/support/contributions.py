"""One contribution of each kind, made by the steps of CONTRIBUTING.md: what every step changes, and in which file.

test_contributing.py makes these changes in a copy of the package and uses what they add. If a change no longer fits
the code, look at what its step says first: the page has the same mistake.
"""

from typing import NamedTuple


class Edit(NamedTuple):
    """A change that a step asks for. old: the text that `new` replaces, once in the file; empty for a new file."""

    step: int
    file: str
    old: str
    new: str


CONFIG_KEY = [
    Edit(
        1,
        "maedistill/config/pretrain.py",
        "    eval_crop: Crop =",
        '    negatives: bool = result(False, "train on negatives")\n    eval_crop: Crop =',
    ),
    Edit(
        2,
        "maedistill/config/pretrain_rules.py",
        "def _visible_shares(",
        """def _negatives(c: PretrainConfig) -> Iterator[Problem]:
    if c.data.negatives and c.method == "amd":
        yield Problem("data.negatives", "method=amd was never tried with it", "remove it")


def _visible_shares(""",
    ),
    Edit(2, "maedistill/config/pretrain_rules.py", "RULES = (", "RULES = (\n    _negatives,"),
    Edit(
        3,
        "maedistill/pretraining/build.py",
        "    pixels = to_float01(images)\n",
        "    pixels = to_float01(255 - images if config.data.negatives else images)\n",
    ),
]

METHOD = [
    Edit(
        1,
        "maedistill/losses/pooled.py",
        "",
        '''"""Distance of means."""

from torch import Tensor
from torch.nn.functional import cosine_similarity


def pooled_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return 1 - cosine of the mean tokens: [B, S, D] twice -> scalar."""
    return 1 - cosine_similarity(student.float().mean(1), teacher.detach().float().mean(1)).mean()
''',
    ),
    Edit(
        2,
        "maedistill/methods/pooled.py",
        "",
        '''"""MAE plus a loss on the mean of the visible tokens."""

from dataclasses import dataclass

from torch import Tensor, nn

from maedistill.losses.pooled import pooled_loss
from maedistill.methods.mae import MAE, BlockFeatures, Losses, PixelSpec
from maedistill.models.decoder import TokenDecoder
from maedistill.models.encoder import Encoder
from maedistill.models.masking import PatchSplit


@dataclass(frozen=True)
class PooledSpec:
    """The blocks whose tokens are averaged."""

    student_tap: int
    teacher_tap: int
    teacher_width: int
    weight: float


class Pooled(MAE):
    """MAE plus `pooled_loss`."""

    def __init__(self, encoder: Encoder, decoder: TokenDecoder, *, pixels: PixelSpec, pooled: PooledSpec) -> None:
        super().__init__(encoder, decoder, pixels=pixels)
        self.pooled, self.projection = pooled, nn.Linear(encoder.width, pooled.teacher_width)

    def forward(self, images: Tensor, split: PatchSplit, target: BlockFeatures | None = None) -> Losses:
        """Return MAE's losses and `align`."""
        assert target is not None
        pixels, features = self.reconstruct(images, split, (self.pooled.student_tap,))
        projected = self.projection(features[self.pooled.student_tap])
        align = pooled_loss(projected, target[self.pooled.teacher_tap])
        return self.add_pixels(pixels, self.pooled.weight * align, {"align": align})
''',
    ),
    Edit(
        4,
        "maedistill/config/pretrain.py",
        'method: Literal["mae", "dmae", "amd", "tinymim"]',
        'method: Literal["mae", "dmae", "amd", "tinymim", "pooled"]',
    ),
    Edit(
        4,
        "maedistill/config/pretrain_rules.py",
        'if c.method in ("dmae", "tinymim") and teacher',
        'if c.method in ("dmae", "tinymim", "pooled") and teacher',
    ),
    Edit(
        5,
        "maedistill/pretraining/build.py",
        'METHODS: dict[str, type[MAE]] = {"mae": MAE,',
        'METHODS: dict[str, type[MAE]] = {"pooled": Pooled, "mae": MAE,',
    ),
    Edit(
        5,
        "maedistill/pretraining/build.py",
        "from maedistill.methods.teacher import Teacher\n",
        "from maedistill.methods.pooled import Pooled, PooledSpec\nfrom maedistill.methods.teacher import Teacher\n",
    ),
    Edit(
        5,
        "maedistill/pretraining/build.py",
        '    if config.method == "tinymim":\n        return',
        """    if config.method == "pooled":
        return {"pooled": PooledSpec(spec.student_taps[0], spec.teacher_taps[0], width, spec.weight)}
    if config.method == "tinymim":
        return""",
    ),
    Edit(
        6,
        "maedistill/weights/run_metadata.py",
        'method: Literal["mae", "dmae", "amd", "tinymim"]',
        'method: Literal["mae", "dmae", "amd", "tinymim", "pooled"]',
    ),
    Edit(
        6,
        "maedistill/exporting/card.py",
        "METHODS = {\n",
        'METHODS = {\n    "pooled": "by the mean of its tokens",\n',
    ),
    Edit(
        8,
        "configs/example/pooled.yaml",
        "",
        "# MAE plus the mean of tokens: no paper.\nextends: ../cifar10/base.yaml\nmethod: pooled\n"
        "teacher: {source: run:runs/cifar10/teacher}\nalign: {student: [3], teacher: [5]}\n",
    ),
]

TERM = [
    Edit(
        1,
        "maedistill/losses/features.py",
        "def attention_transfer_loss(",
        '''def norm_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared difference of the logarithms of norms: [B, D_s], [B, D_t] -> scalar."""
    s, t = (side.float().norm(dim=1).log() for side in (student, teacher.detach()))
    return (s - t).square().mean()


def attention_transfer_loss(''',
    ),
    Edit(
        2,
        "maedistill/config/distill.py",
        "class DistillConfig(Section):",
        '''class NormsConfig(TermConfig):
    """Norms of pooled features."""

    weight: Weight = result(0.0, "weight; 0: off")


class DistillConfig(Section):''',
    ),
    Edit(
        2,
        "maedistill/config/distill.py",
        "    contrastive: ContrastiveConfig = ContrastiveConfig()\n",
        "    contrastive: ContrastiveConfig = ContrastiveConfig()\n    norms: NormsConfig = NormsConfig()\n",
    ),
    Edit(
        3,
        "maedistill/finetuning/terms.py",
        "TERMS: dict[str, type[Term]] = {\n",
        '''class Norms(Term):
    """Norms of pooled features."""

    def _losses(self, student: Outputs, teacher: Outputs, targets: Tensor, number: int) -> Parts:
        return {"": norm_loss(student["embedding"], teacher["embedding"])}


TERMS: dict[str, type[Term]] = {
    "norms": Norms,
''',
    ),
    Edit(
        3,
        "maedistill/finetuning/terms.py",
        "import attention_transfer_loss, feature_loss\n",
        "import attention_transfer_loss, feature_loss, norm_loss\n",
    ),
    Edit(
        4,
        "maedistill/finetuning/build_distillation.py",
        "any(name in distill.terms for name in BATCH_RELATION_TERMS)",
        'any(name in distill.terms for name in (*BATCH_RELATION_TERMS, "norms"))',
    ),
]

SOURCE = [
    Edit(
        1,
        "maedistill/config/sources.py",
        'NETWORK_KINDS = ("run", "timm",',
        'NETWORK_KINDS = ("run", "numpy", "timm",',
    ),
    Edit(
        2,
        "maedistill/weights/from_numpy.py",
        "",
        '''"""Open arrays of a timm ViT: NAME.npz beside the model's name, `MODEL,NAME.npz`."""

import numpy as np
import timm
import torch

from maedistill.errors import DataError
from maedistill.models.vits import TimmModel, require_known
from maedistill.weights.from_file import Inspect


def open_numpy(name: str, inspect_network: Inspect) -> TimmModel:
    """Return the model with its weights. Raises DataError for a file that cannot be read."""
    model, _, path = name.partition(",")
    require_known(model)
    with torch.device("meta"):
        size = inspect_network(timm.create_model(model, num_classes=0))
    vit: TimmModel = timm.create_model(model, num_classes=0)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            vit.load_state_dict({key: torch.from_numpy(arrays[key]) for key in arrays})
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{path} cannot be read ({error})", "name a file of numpy.savez") from error
    if size:
        vit.set_input_size(img_size=size)
    return vit.eval()
''',
    ),
    Edit(
        3,
        "maedistill/weights/open_network.py",
        '    elif kind == "file":\n',
        """    elif kind == "numpy":
        vit = open_numpy(name, check)
        network = Network(vit, source, vit.patch_embed.img_size[0], NOT_STATED, audit="all keys")
    elif kind == "file":
""",
    ),
    Edit(
        3,
        "maedistill/weights/open_network.py",
        "from maedistill.weights.from_run import",
        "from maedistill.weights.from_numpy import open_numpy\nfrom maedistill.weights.from_run import",
    ),
]

COMMAND = [
    Edit(0, "maedistill/cli.py", "COMMANDS = {\n", 'COMMANDS = {\n    "hello": "say hello",\n'),
    Edit(
        0,
        "maedistill/commands/hello.py",
        "",
        '"""The command `hello`."""\n\n\ndef main() -> None:\n    """Say hello."""\n    print("hello")\n',
    ),
]

CONTRIBUTIONS = {
    "Add a config key": CONFIG_KEY,
    "Add a pre-training method": METHOD,
    "Add a distillation term": TERM,
    "Add a source of weights": SOURCE,
    "Add a command": COMMAND,
}
