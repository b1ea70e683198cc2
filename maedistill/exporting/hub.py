"""Push an export to the Hugging Face hub. Afterwards the repository holds this export and nothing else.

timm's push_to_hf_hub knows no graphs, keeps a card that it finds there, with the license of other weights, and leaves
old files. So the folder, of which timm wrote its part, goes up as it is. `upload_folder` may split it into commits;
here one commit adds all files and deletes all others, or nothing changes.

The token is the one that huggingface_hub finds, in HF_TOKEN or of a login. Nothing here reads or keeps it.
"""

from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from maedistill.errors import ConfigError, DataError, UserError
from maedistill.weights.from_file import why_unreadable
from maedistill.weights.from_run import read_metadata
from maedistill.weights.license import why_unpublishable

# HfHubHTTPError derives from the errors of the HTTP client, httpx2 or, in earlier versions, httpx or requests.
_HTTP = [kind for kind in HfHubHTTPError.__mro__ if issubclass(kind, Exception) and "HTTP" in kind.__name__]
_ERRORS: tuple[type[Exception], ...] = (OSError, RuntimeError, ValueError, *_HTTP)


def require_pushable(name: str, run: str | Path) -> None:
    """Raise ConfigError, before an export is written, unless its push has a name, a token and a stated license."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"--push-to-hub: {error}", "name a repository, USER/NAME") from None
    if "/" not in name:
        raise ConfigError(f"--push-to-hub: {name!r} does not say whose", "name a repository, USER/NAME")
    metadata = read_metadata(run)[1]
    if problem := why_unpublishable(metadata["license"], (metadata.get("origin") or {}).get("license", "")):
        raise ConfigError(
            f"--push-to-hub: {problem}",
            "set teacher.license or init.license to the one that applies, and start the same training again: only the "
            "record changes",
        )
    if get_token() is None:
        raise ConfigError("--push-to-hub: there is no token for the hub", "set HF_TOKEN, or log in: hf auth login")


def push(folder: Path, name: str, *, public: bool = False) -> str:
    """Push the files of an export to the repository USER/NAME, which is made if need be; return its address.

    public: whether others see it. Raises ConfigError for a repository of the other kind, DataError if the hub refuses.
    """
    api = HfApi(library_name="maedistill")
    try:
        api.create_repo(name, private=not public, exist_ok=True)
        before = api.model_info(name)
        if bool(before.private) == public:
            kind, remedy = ("private", "leave out") if public else ("public", "add")
            raise ConfigError(f"--push-to-hub: {name} is {kind} already", f"{remedy} --public, or use another name")
        card = (folder / "README.md").read_text(encoding="utf-8").replace("local-dir:THIS_FOLDER", f"hf-hub:{name}")
        files: dict[str, Path | bytes] = {path.name: path for path in folder.iterdir()} | {"README.md": card.encode()}
        old = {file.rfilename for file in before.siblings or ()} - files.keys() - {".gitattributes"}
        deleted, added = map(CommitOperationDelete, old), (CommitOperationAdd(*file) for file in files.items())
        api.create_commit(name, [*deleted, *added], commit_message="Export of maedistill", parent_commit=before.sha)
    except UserError:
        raise
    except _ERRORS as error:
        cause = error.__cause__ if type(error) is RuntimeError else None  # of an upload that failed
        reason = why_unreadable(cause if isinstance(cause, Exception) else error)
        raise DataError(
            f"{name} cannot be pushed ({reason}); the export is in {folder}",
            "check the name, the connection, and that the token may write there; then start the same command again",
        ) from error
    return f"{api.endpoint}/{name}"
