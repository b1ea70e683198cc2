"""The user's cache folder, also for a user without a home: a container that is started with a bare user id has none."""

import os
import tempfile
from pathlib import Path

from maedistill.data.remote.private import open_private_folder
from maedistill.durable import require_local
from maedistill.errors import ConfigError
from maedistill.escaping import say

FOLDER_VARIABLE = "MAEDISTILL_CACHE"


def user_cache() -> Path:
    """Return our cache folder: MAEDISTILL_CACHE, else `maedistill` in XDG_CACHE_HOME or in ~/.cache.

    Raise `ConfigError` if MAEDISTILL_CACHE is an address.
    """
    if own := os.environ.get(FOLDER_VARIABLE):
        require_local(own, FOLDER_VARIABLE)
        return Path(os.path.abspath(os.path.expanduser(own)))
    ensure_home()
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "maedistill")


def make_user_cache() -> None:
    """Create the cache folder, closed to other users. Raise OSError if that is impossible."""
    user_cache().mkdir(mode=0o700, parents=True, exist_ok=True)


def ensure_home() -> None:
    """Set HOME to a private temporary folder if the user has no home, or one that this user may not enter.

    Without HOME and an entry in the password file, Hugging Face, torch and Triton would keep their files in a folder
    called `~` of the working directory. Raise `ConfigError` if the temporary folder cannot be used.
    """
    home = os.path.expanduser("~")
    is_closed = os.path.isdir(home) and not os.access(home, os.X_OK)
    if os.path.isabs(home) and not is_closed and (home != "/" or os.access(home, os.W_OK)):
        return
    remedy = "set HOME to a folder that this user can write to"
    try:
        folder = Path(tempfile.gettempdir(), f"maedistill-{os.geteuid()}")
        os.close(open_private_folder(folder, remedy))
    except OSError as error:
        raise ConfigError(f"this user has no home folder, and no temporary one can be made: {error}", remedy) from error
    os.environ["HOME"] = str(folder)
    say(f"warning: this user has no home folder: caches go to {folder}; set HOME to keep them elsewhere", error=True)
