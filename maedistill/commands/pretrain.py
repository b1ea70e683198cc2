"""Pre-train a small Vision Transformer by MAE, or distil a teacher by DMAE, AMD or token relations (TinyMIM)."""

from maedistill.commands.stage import run_command
from maedistill.config.pretrain import PretrainConfig

EXAMPLES = """\
examples:
  maedistill pretrain imagenet/amd_vit_s data.train='in1k/train-{0000..1023}.tar' run=runs/amd_s
  torchrun --nproc-per-node 8 -m maedistill pretrain imagenet/dmae_vit_b data.train=... run=runs/dmae_b
  deepspeed --num_gpus 8 --module maedistill pretrain CONFIG engine.zero=1
  srun --ntasks-per-node 8 maedistill pretrain CONFIG
"""


def start(config: PretrainConfig, *, fresh: bool, extend: bool) -> None:
    """Start or continue the run."""
    from maedistill.pretraining.loop import pretrain

    pretrain(config, fresh=fresh, extend=extend)


def dry_run(config: PretrainConfig, *, extend: bool) -> None:
    """Print what the run would do."""
    from maedistill.pretraining import setup

    setup.dry_run(config, extend=extend)


def main() -> None:
    """Read the command line and run the stage."""
    run_command(PretrainConfig, about=__doc__, examples=EXAMPLES, start=start, dry_run=dry_run)
