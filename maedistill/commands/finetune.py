"""Fine-tune a Vision Transformer on labels, and evaluate it on every validation image once."""

from maedistill.commands.stage import run_command
from maedistill.config.finetune import FinetuneConfig

EXAMPLES = """\
examples:
  maedistill finetune finetune/vit_small init.source=run:runs/dmae_s run=runs/dmae_s_finetuned \\
      data.train='in1k/train-{0000..1023}.tar' data.val='in1k/val-*.tar'
  torchrun --nproc-per-node 8 -m maedistill finetune CONFIG init.source=timm:vit_base_patch16_224.mae ...
  maedistill finetune CONFIG ...                            without init.source: from scratch
  maedistill finetune CONFIG data.image_size=384 ...        at a higher resolution
  maedistill finetune CONFIG data.label_fraction=0.01 ...   on 1 % of the labels
"""


def start(config: FinetuneConfig, *, fresh: bool, extend: bool) -> None:
    """Start or continue the run."""
    from maedistill.finetuning.loop import finetune

    finetune(config, fresh=fresh, extend=extend)


def dry_run(config: FinetuneConfig, *, extend: bool) -> None:
    """Print what the run would do."""
    from maedistill.finetuning import setup

    setup.dry_run(config, extend=extend)


def main() -> None:
    """Read the command line and run the stage."""
    run_command(FinetuneConfig, about=__doc__, examples=EXAMPLES, start=start, dry_run=dry_run)
