"""The configs of the parts: the published ones, or tiny networks of the same kind."""

from collections.abc import Sequence

from gpu_parts.check import ROOT, Check
from maedistill.config.loader import load_config
from maedistill.config.pretrain import PretrainConfig

LIGHT = ["decoder.width=384", "decoder.depth=4", "decoder.num_heads=6"]  # the default decoder
# Part -> title, file in configs/imagenet, settings on top of it.
NETWORKS = {
    "speed": ("DMAE L -> B, light decoder", "dmae_vit_b.yaml", LIGHT),
    "speed-published": ("DMAE L -> B, published decoder", "dmae_vit_b.yaml", []),
    "speed-small": ("DMAE B -> S, published decoder", "dmae_vit_s.yaml", []),
    "speed-amd": ("AMD L -> B", "amd_vit_b.yaml", []),
    "details": ("DMAE L -> B, light decoder", "dmae_vit_b.yaml", LIGHT),
}
# ViT-B is wide enough to have a known published decoder, so the plain loop with that decoder is tested as well.
_WIDE_TEACHER = ["teacher.source=random:vit_base_patch16_224", "teacher.depth=2"]
_TEACHER = ["teacher.source=random:vit_tiny_patch16_224", "teacher.depth=2"]
_TINY = ["data.image_size=64", "student.model=vit_tiny_patch16_224", "student.depth=2"]
_TINY += ["decoder.width=64", "decoder.depth=1", "decoder.num_heads=2"]
_METHODS = {
    "mae": [],
    "dmae": ["align.student=[1]", "align.teacher=[1]"],
    "amd": ["align.student=[0,1]", "align.teacher=[0,1]", "masks.teacher_keep_ratio=0.5"],
    "tinymim": ["align.student=[1]", "align.teacher=[1]", "teacher.num_heads=3"],
}


def speed_config(check: Check, *, batch: int, compiled: bool) -> PretrainConfig:
    """Load the config in `NETWORKS` that the part of `check` measures."""
    _, file, settings = NETWORKS[check.part]
    light = settings is LIGHT
    method = file.partition("_")[0]
    teacher = _WIDE_TEACHER if light else _TEACHER
    tiny = [*_TINY, *teacher, *_METHODS[method]] if check.tiny else []
    tiny += ["engine.precision=fp32"] if not check.on_card else []  # half precision is slow on a CPU
    batches = [f"optim.global_batch={batch}", f"engine.micro_batch={batch}"]
    return _load(file, [*settings, *tiny, *batches, f"engine.compile={str(compiled).lower()}"])


def tiny_config(method: str, settings: Sequence[str] = ()) -> PretrainConfig:
    """Load a config of tiny networks for images of 64 px: a student of 2 blocks, a teacher of 2, both 192 wide."""
    teacher = _TEACHER if method != "mae" else []
    fixed = [f"method={method}", *_TINY, *teacher, *_METHODS[method], "engine.compile=false"]
    return _load("base.yaml", [*fixed, *settings])


def _load(file: str, settings: Sequence[str]) -> PretrainConfig:
    """Load a config of configs/imagenet."""
    path = ROOT / "configs" / "imagenet" / file
    return load_config(path, settings, root=PretrainConfig, to_run=False).config
