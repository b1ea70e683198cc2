"""Exports a run's network as a timm model with its model card. `tools/export.py --help` shows how."""

import argparse
import sys

from maedistill.errors import exit_code_of

EXAMPLES = """\
examples:
  python tools/export.py runs/dmae_s                           its encoder, to runs/dmae_s/export
  python tools/export.py runs/dmae_s --global-pool token    the class token in place of the patches' mean
  python tools/export.py runs/dmae_s_finetuned --out dmae_s    the classifier
  python tools/export.py runs/dmae_s_finetuned --ema           the moving average of its weights

The folder loads wherever timm is: timm.create_model("local-dir:FOLDER", pretrained=True). Exit codes: 0 done, 2 usage,
3 no run, no such weights, or nothing could be written.
"""


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split(".")[0], epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="a run folder of tools/pretrain.py or tools/finetune.py")
    parser.add_argument("--out", help="folder to write, RUN/export by default; an earlier export there is replaced")
    parser.add_argument("--ema", action="store_true", help="the moving average of the weights (runs with optim.ema)")
    parser.add_argument(
        "--global-pool",
        choices=["avg", "token"],
        help="output of a pre-trained student: the mean of its patch tokens (the default), or its class token",
    )
    return parser.parse_args()


def main() -> None:
    """Write the export and print a summary of it."""
    arguments = parse()
    from maedistill.export.folder import export, read_record  # imports torch, for which --help need not wait

    weights = "ema" if arguments.ema else "model"
    out = export(arguments.run, arguments.out, weights=weights, global_pool=arguments.global_pool)
    record = read_record(out)
    megabytes = sum(path.stat().st_size for path in out.iterdir()) / 1e6
    print(
        f"exported {record['checkpoint']} of {record['run']} to {out} ({weights}, {record['global_pool']} pooling)\n"
        f"parity   max difference {record['max_difference']} over {record['values']:,} values, opened again by timm\n"
        f"size     {megabytes:.2f} MB\n"
        f"license  {record['license']}\n\n"
        "import timm\n"
        f'model = timm.create_model("local-dir:{out}", pretrained=True).eval()'
    )


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
