"""Push an export to the Hugging Face hub. Afterwards the repository holds this export and nothing else.

timm's push_to_hf_hub knows no graphs, keeps a card that it finds there, with the license of other weights, and leaves
old files. So the folder, of which timm wrote its part, goes up as it is. `upload_folder` may split it into commits;
here one commit adds all files and deletes those of an earlier export, or nothing changes.

The token is the one that huggingface_hub finds, in HF_TOKEN or of a login. Nothing here reads or keeps it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, validate_repo_id

from maedistill.errors import ConfigError, DataError, UserError, join_first
from maedistill.exporting.folder import FILES, RECORD
from maedistill.runs.folder import RunFolder
from maedistill.weights.from_file import why_unreadable
from maedistill.weights.from_run import validated_metadata
from maedistill.weights.license import why_unpublishable

# HfHubHTTPError derives from the errors of the HTTP client, httpx2 or, in earlier versions, httpx or requests.
_HTTP = [kind for kind in HfHubHTTPError.__mro__ if issubclass(kind, Exception) and "HTTP" in kind.__name__]
_ERRORS: tuple[type[Exception], ...] = (OSError, RuntimeError, ValueError, *_HTTP)


def require_pushable(name: str, run: str | Path, *, public: bool = False) -> None:
    """Raise as `push` does, before an export is written, unless it has a name, a license, a token and a repository."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"--push-to-hub: {error}", "name a repository, USER/NAME") from None
    if "/" not in name:
        raise ConfigError(f"--push-to-hub: {name!r} has no user name", "name a repository, USER/NAME")
    metadata = validated_metadata(RunFolder(run))
    if problem := why_unpublishable(metadata["license"], (metadata.get("origin") or {}).get("license", "")):
        raise ConfigError(
            f"--push-to-hub: {problem}",
            "set teacher.license or init.license to the one that applies, and start the same training again: only the "
            "record changes",
        )
    if get_token() is None:
        raise ConfigError("--push-to-hub: there is no token for the hub", "set HF_TOKEN, or log in: hf auth login")
    with _refusals(name):
        _open_repository(name, public=public)


def push(folder: Path, name: str, *, public: bool = False) -> str:
    """Push the files of an export to the repository USER/NAME, which is created if needed; return its address.

    public: whether others see it. Raises ConfigError for a repository that is not for it, DataError if the hub refuses.
    """
    with _refusals(name, f"; the export is in {folder}"):
        api, commit, held = _open_repository(name, public=public)
        paths = [path for path in folder.resolve().iterdir() if path.name in FILES and not path.is_symlink()]
        files: dict[str, Path | bytes] = {path.name: path for path in paths if path.is_file()}
        if isinstance(card := files.get("README.md"), Path):
            text = card.read_text(encoding="utf-8").replace("local-dir:THIS_FOLDER", f"hf-hub:{name}")
            files["README.md"] = text.encode()
        deleted = map(CommitOperationDelete, held & FILES - files.keys())
        added = (CommitOperationAdd(*file) for file in files.items())
        api.create_commit(name, [*deleted, *added], commit_message="Export of maedistill", parent_commit=commit)
    return f"{api.endpoint}/{name}"


def _open_repository(name: str, *, public: bool) -> tuple[HfApi, str | None, set[str]]:
    """Make the repository if need be, see that an export may replace what it holds; return its commit and files."""
    api = HfApi(library_name="maedistill", token=True)
    api.create_repo(name, private=not public, exist_ok=True)
    found = api.model_info(name)
    if found.id != name:
        raise ConfigError(f"--push-to-hub: {name} is {found.id} on the hub", "use that name, or another one")
    if bool(found.private) == public:
        kind, remedy = ("private", "leave out") if public else ("public", "add")
        raise ConfigError(f"--push-to-hub: {name} is {kind} already", f"{remedy} --public, or use another name")
    held = {file.rfilename for file in found.siblings or ()}
    names = held - {"README.md", ".gitattributes"}  # which the hub itself may have made
    if names and not (RECORD in names and names <= FILES):
        others = join_first(sorted(names - FILES or names), 3)
        raise ConfigError(f"--push-to-hub: {name} holds something other than an export ({others})", "use another name")
    # `create_repo` passes over a token that may not write to a repository that exists, and `auth_check` of earlier
    # versions of huggingface_hub knows no writing.
    may_write = f"{api.endpoint}/api/models/{name}/auth-check/write"
    hf_raise_for_status(get_session().get(may_write, headers=build_hf_headers(token=True)))
    return api, found.sha, held


@contextmanager
def _refusals(name: str, left: str = "") -> Iterator[None]:
    """Translate errors of the hub and of the connection to DataError. left: what is there nevertheless."""
    try:
        yield
    except UserError:
        raise
    except _ERRORS as error:
        cause = error.__cause__ if type(error) is RuntimeError else None  # of an upload that failed
        reason = why_unreadable(cause if isinstance(cause, Exception) else error)
        raise DataError(
            f"{name} cannot be pushed ({reason}){left}",
            "check the name, the connection, and that the token may write there; then start the same command again",
        ) from error
