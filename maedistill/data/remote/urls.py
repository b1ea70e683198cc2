"""Check remote addresses, expand patterns, and read file sizes and small files.

    pattern -> list_urls -> URLs          URL -> file_size -> bytes          URL -> read_small -> content

`download.py` downloads the shards, into the cache.
"""

import re

from maedistill.data.remote.download import RetryPolicy, retry
from maedistill.data.remote.streams import STORES, WEB, MissingError, TransferError, list_store, open_stream
from maedistill.errors import ConfigError

_URL = re.compile(r"\s*[A-Za-z][A-Za-z0-9+.-]+:")
_PLAIN = re.compile(r"([a-z0-9]+)://([^/\s]+)/[^\s]*")


def is_url(text: str) -> bool:
    """Return whether any library might take the text for a URL, including `PIPE:x` and ` pipe:x`."""
    return bool(_URL.match(text))


def check_url(url: str) -> None:
    """Raise `ConfigError` unless this is a plain URL with a known scheme."""
    known = ", ".join(f"{scheme}://" for scheme in (*WEB, *STORES))
    match = _PLAIN.fullmatch(url)
    if not match or match[1] not in (*WEB, *STORES):
        raise ConfigError(f"{url!r} is no address that shards are read from", f"give a path or one of {known}")
    if "::" in url:
        raise ConfigError(f"{url!r} is a chain of protocols", f"give one plain address: {known}")
    if match[1] in WEB and ("@" in match[2] or re.search(r"[?#]", url)):
        raise ConfigError(
            "a web address of shards has a password, a query (?) or a fragment (#)",
            "use a plain address; for shards that need credentials s3://, gs:// or hf:// with the environment's own",
        )


def list_urls(pattern: str, *, patience: RetryPolicy | None = None) -> list[str]:
    """Return the URLs in a store that match a glob pattern. Raise `ConfigError` for the web, which has no listings."""
    scheme, _, path = pattern.partition("://")
    if scheme in WEB:
        raise ConfigError(
            f"{pattern!r} has a wildcard, and web servers do not list files", "write a range, as train-{0000..1023}.tar"
        )
    patience = patience or RetryPolicy()
    files = retry(lambda: list_store(scheme, path, timeout=patience.timeout), pattern, patience=patience)
    return [f"{scheme}://{file}" for file in files]


def file_size(url: str, *, patience: RetryPolicy) -> int:
    """Return the size of a remote file in bytes. Raise `DataError` if it is missing or its size is not stated."""

    def attempt() -> int:
        with open_stream(url, last=0, timeout=patience.timeout) as stream:
            if stream.size is None:
                raise TransferError("the server does not tell the file's size", final=True)
            return stream.size

    return retry(attempt, url, patience=patience)


def read_small(url: str, *, patience: RetryPolicy, most: int = 1 << 30) -> bytes | None:
    """Read a small file, e.g. an index; None if it is missing. Raise `DataError` on failure or above `most` bytes."""

    def attempt() -> bytes | None:
        data = bytearray()
        try:
            with open_stream(url, timeout=patience.timeout) as stream:
                for chunk in stream.chunks:
                    data += chunk
                    if len(data) > most:
                        raise TransferError(f"the file has more than {most:,} bytes", final=True)
        except MissingError:
            return None
        if stream.size is not None and len(data) != stream.size:
            raise TransferError(f"it ended after {len(data):,} of {stream.size:,} bytes")
        return bytes(data)

    return retry(attempt, url, patience=patience)
