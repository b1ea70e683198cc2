"""`maedistill finetune`, for launchers that start a script: deepspeed --num_gpus 8 tools/finetune.py CONFIG ...."""

from maedistill.cli import run

if __name__ == "__main__":
    run("finetune")
