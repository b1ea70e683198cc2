"""Fine-tunes a Vision Transformer on labels and evaluates it exactly. See `tools/finetune.py --help`."""

from maedistill.cli import run_tool
from maedistill.config.finetune import FinetuneConfig

EXAMPLES = """\
examples:
  python tools/finetune.py configs/finetune/vit_small.yaml init.source=run:runs/dmae_s run=runs/dmae_s_finetuned \\
      data.train='in1k/train-{0000..1023}.tar' data.val='in1k/val-*.tar'
  torchrun --nproc-per-node 8 tools/finetune.py CONFIG init.source=timm:vit_base_patch16_224.mae ...
  python tools/finetune.py CONFIG ...                            without init.source: from scratch
  python tools/finetune.py CONFIG data.image_size=384 ...        at a higher resolution
  python tools/finetune.py CONFIG data.label_fraction=0.01 ...   on 1 % of the labels
"""


def start(config: FinetuneConfig, *, fresh: bool, extend: bool) -> None:
    """Start or continue the run."""
    from maedistill.finetuning.loop import finetune

    finetune(config, fresh=fresh, extend=extend)


def dry_run(config: FinetuneConfig) -> None:
    """Print what the run would do."""
    from maedistill.finetuning import setup

    setup.dry_run(config)


if __name__ == "__main__":
    run_tool(FinetuneConfig, about=__doc__.split(".")[0], examples=EXAMPLES, start=start, dry_run=dry_run)
