"""Pre-trains a small Vision Transformer by MAE, or distils a teacher by DMAE or AMD. See `tools/pretrain.py --help`."""

from maedistill.cli import run_tool
from maedistill.config.pretrain import PretrainConfig

EXAMPLES = """\
examples:
  python tools/pretrain.py configs/imagenet/amd_vit_s.yaml data.train='in1k/train-{0000..1023}.tar' run=runs/amd_s
  torchrun --nproc-per-node 8 tools/pretrain.py configs/imagenet/dmae_vit_b.yaml data.train=... run=runs/dmae_b
  deepspeed --num_gpus 8 tools/pretrain.py CONFIG engine.zero=1
  srun --ntasks-per-node 8 python tools/pretrain.py CONFIG
"""


def start(config: PretrainConfig, *, fresh: bool, extend: bool) -> None:
    """Start or continue the run."""
    from maedistill.pretraining.loop import pretrain

    pretrain(config, fresh=fresh, extend=extend)


def dry_run(config: PretrainConfig) -> None:
    """Print what the run would do."""
    from maedistill.pretraining import setup

    setup.dry_run(config)


if __name__ == "__main__":
    run_tool(PretrainConfig, about=__doc__.split(".")[0], examples=EXAMPLES, start=start, dry_run=dry_run)
