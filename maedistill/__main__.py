"""`python -m maedistill COMMAND ...`, for launchers: torchrun --nproc-per-node 8 -m maedistill pretrain CONFIG."""

from maedistill.cli import main

if __name__ == "__main__":
    main()
