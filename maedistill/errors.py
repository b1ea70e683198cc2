"""Errors for users: one line for the cause, one for the remedy, and an exit code.

Every error that a user can fix is a `UserError`; a command prints it as two lines on stderr. A pre-empted run ends with
`Preempted` and one line. Any other exception is a bug in maedistill and keeps its traceback.

    code  meaning
    2     usage: config, command line, a run folder made with other settings
    3     data: shards, images, labels, a damaged checkpoint or teacher file
    4     numerics: a loss or gradient that is not finite
    5     a peer process or the hardware
    75    pre-empted: state saved, start it again
    130   Ctrl-C: saved if training had begun
"""

import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import NoReturn

from maedistill.escaping import has_secret, masked, say, shown, traceback_lines


class UserError(ValueError):
    """An error that a user can fix: `cause` says what is wrong, `remedy` what to do about it."""

    exit_code = 2

    def __init__(self, cause: str, remedy: str) -> None:
        self.cause, self.remedy = shown(cause), shown(remedy)  # one line each, whatever files and libraries say in them
        super().__init__(f"{self.cause}\n{self.remedy}")

    def __reduce__(self) -> tuple[type["UserError"], tuple[str, str]]:
        """Keep the type when the error is pickled in a loader process."""
        return type(self), (self.cause, self.remedy)


class ConfigError(UserError):
    """Invalid settings, or a command that cannot be carried out."""


class DataError(UserError):
    """Unusable shards, images, labels, checkpoints or teacher files."""

    exit_code = 3


class NumericsError(UserError):
    """A loss, gradient or weight that is not finite."""

    exit_code = 4


class PeerError(UserError):
    """Another process of the same run, or the hardware, failed."""

    exit_code = 5


def require_no_secret(text: str, place: str) -> None:
    """Raise `ConfigError` for a password or token in an address, which records would keep."""
    if has_secret(text):
        raise ConfigError(
            f"{masked(place)}: an address holds a password or token, or *** in its place",
            "give the address without it: stores read credentials from the environment, such as HF_TOKEN",
        )


def join_first(texts: Iterable[str], most: int = 8, *, separator: str = ", ") -> str:
    """Join the first few texts, and say how many more there are."""
    texts = list(texts)
    return separator.join(texts[:most]) + (f" and {len(texts) - most:,} more" if len(texts) > most else "")


def device_error(error: BaseException) -> UserError | None:
    """Translate an error of a GPU; return None for others. Matches types by name, to avoid importing torch."""
    kinds = {kind.__name__ for kind in type(error).__mro__ if kind.__module__.split(".")[0] == "torch"}
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    if "OutOfMemoryError" in kinds:
        return ConfigError(
            f"the GPU has too little memory ({reason})",
            "use a smaller engine.micro_batch or --batch, or in training engine.activation_checkpointing=true or "
            "engine.zero=1 to 3; nvidia-smi shows what else uses this GPU",
        )
    if "AcceleratorError" in kinds:
        return PeerError(
            f"the GPU failed ({reason})",
            "the same command continues from the newest checkpoint; if it fails again, look at dmesg and nvidia-smi -q "
            "for ECC and Xid errors and use another GPU; CUDA_LAUNCH_BLOCKING=1 names the operation",
        )
    return None


class Preempted(Exception):
    """The run saved its state and stopped because of a signal. It is not an error, hence not a `UserError`.

    command: what continues the run; without it, the message says that the same command does.
    """

    def __init__(self, signal: str, step: int, *, command: str | None = None) -> None:
        by_hand = signal == "SIGINT"
        self.exit_code = 130 if by_hand else 75
        how = f"\ncontinue with: {shown(command)}" if command else "; the same command continues from there"
        super().__init__(f"stopped by {'Ctrl-C' if by_hand else signal} after step {step}, which is saved{how}")


def print_error(error: UserError) -> None:
    """Print an error as two lines on stderr."""
    _say(f"error: {error.cause}", f"  fix: {error.remedy}")


def exit_code_of(main: Callable[[], None]) -> int:
    """Run `main` and return its exit code: 0 on success, else that of its `UserError` or `Preempted`.

    Prints a `UserError` as two lines on stderr and `Preempted` as one. Treats GPU errors as `UserError`. Any other
    exception passes through.
    """
    try:
        main()
    except UserError as error:
        print_error(error)
        return error.exit_code
    except Preempted as stop:
        _say(*str(stop).split("\n"))
        return stop.exit_code
    except KeyboardInterrupt:
        _say("stopped by Ctrl-C")
        return 130
    except RuntimeError as error:
        translated = device_error(error)
        if translated is None:
            raise
        print_error(translated)
        return translated.exit_code
    return 0


def leave(main: Callable[[], None]) -> NoReturn:
    """Run `main` as `exit_code_of` does and end the process with its exit code, without interpreter teardown.

    During teardown, a finished rank has aborted ("terminate called without an active exception", from threads of the
    process group), and the launcher reported a failed run. A rank whose peers are gone may wait for them there, and
    NCCL's communicators may wait for a device that hangs.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed: a file of ours would get its number, and what C code prints
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 it stays open
    try:
        code = exit_code_of(main)
    except SystemExit as stop:  # argparse
        code = stop.code if isinstance(stop.code, int) else 1 if stop.code else 0
        if isinstance(stop.code, str):
            _say(*stop.code.split("\n"))
    except BrokenPipeError:  # the reader of our output has exited, as `head` does
        code = 141
    except BaseException as error:  # a bug: printed as Python would
        _say(*traceback_lines(error))
        code = 1
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # a closed pipe
            stream.flush()
    os._exit(code)


def _say(*lines: str) -> None:
    """Print lines on stderr. Its reader may have left, which must not change the exit code."""
    with suppress(OSError):
        say(*lines, error=True)
