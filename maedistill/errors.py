"""What a user did wrong, or what broke: one line of cause, one of remedy, one exit code.

Every error that a person can mend is a `UserError`; `tools/` turns it into two lines on stderr. Anything else that
is raised is a bug of ours and keeps its traceback.

    code  meaning
    2     usage: config, command line, a run folder that belongs to other settings
    3     data: shards, images, labels, a damaged checkpoint or teacher file
    4     numerics: a loss or gradient that is not finite
    5     a peer process or the hardware
"""

import sys
from collections.abc import Callable


class UserError(ValueError):
    """A mistake that a person can mend: `cause` says what is wrong, `remedy` what to do about it."""

    exit_code = 2

    def __init__(self, cause: str, remedy: str) -> None:
        super().__init__(f"{cause}\n{remedy}")
        self.cause, self.remedy = cause, remedy

    def __reduce__(self) -> tuple[type["UserError"], tuple[str, str]]:
        """Comes out of a loader process as what it went in."""
        return type(self), (self.cause, self.remedy)


class ConfigError(UserError):
    """Wrong settings, or a command that asks for what cannot be."""


class DataError(UserError):
    """Shards, images, labels, checkpoints or teacher files that cannot be used."""

    exit_code = 3


class NumericsError(UserError):
    """A loss, gradient or weight that is not finite."""

    exit_code = 4


class PeerError(UserError):
    """Another process of the same run, or the hardware, failed."""

    exit_code = 5


def exit_code_of(main: Callable[[], None]) -> int:
    """Runs `main`; a `UserError` becomes two lines on stderr and its exit code, success becomes 0."""
    try:
        main()
    except UserError as error:
        print(f"error: {error.cause}\n  fix: {error.remedy}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr, flush=True)
        return 130
    return 0
