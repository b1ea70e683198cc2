"""Make one attempt to read one remote file over HTTP, S3, Google Cloud Storage or the Hugging Face hub.

    URL -> open_stream -> Stream(start, size, tag, chunks)          every wait is limited; failures are TransferErrors

HTTP uses Python's urllib, so that it needs no extra package; the other schemes use fsspec. Only the schemes below are
accepted: a URL never reaches a library that would interpret commands or chains of protocols in it.
"""

import http.client
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import fsspec
from fsspec.asyn import sync

from maedistill.errors import ConfigError

WEB, STORES = ("http", "https"), ("s3", "gs", "hf")
CHUNK = 1 << 20  # bytes per read of a web response
PART = 16 << 20  # bytes per request to a store; each request must finish within the timeout
SLOWEST = 1024  # bytes per second; a slower server counts as stalled

_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+)")
_TRY_AGAIN = (408, 425, 429)  # retryable 4xx codes; all 5xx codes are retried too
_ABSENT, _FORBIDDEN = (404, 410), (401, 403)
_BROKEN = (OSError, http.client.HTTPException)  # errors of a web connection; URLError and timeouts are OSErrors


class TransferError(Exception):
    """One failed attempt, with a message that says how it failed. `final`: a retry cannot help."""

    def __init__(
        self,
        what: str,
        *,
        final: bool = False,
        remedy: str = "check the address, the rights and the network, then start again: what has arrived is kept",
    ) -> None:
        super().__init__(what)
        self.final, self.remedy = final, remedy


class MissingError(TransferError):
    """The file does not exist, or the user has no access to it."""


class Stream(NamedTuple):
    """A remote file that is being read."""

    start: int  # offset in the file at which `chunks` begin: the requested one, or 0
    size: int | None  # bytes of the whole file, if the server states them
    tag: str | None  # strong ETag, which changes whenever the file does
    chunks: Iterator[bytes]


@contextmanager
def open_stream(
    url: str, *, start: int = 0, last: int | None = None, tag: str | None = None, timeout: float
) -> Iterator[Stream]:
    """Open the byte range from `start` to `last` (inclusive) of a remote file.

    The stream begins at byte 0 if the server does not support ranges. A store is read up to the end of the file.
    tag: resume only if the file still has this tag, else begin again. Raise `TransferError`, also from `chunks`.
    """
    scheme = urlsplit(url).scheme
    if scheme in STORES:
        yield _open_store(scheme, url, start, timeout)
        return
    headers = {"Accept-Encoding": "identity", "User-Agent": "maedistill"}
    if start or last is not None:
        headers["Range"] = f"bytes={start}-{'' if last is None else last}"
    if start and tag:
        headers["If-Range"] = tag
    try:
        response = _web().open(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        with error:
            raise _status_error(error.code, error.reason) from error
    except _BROKEN as error:
        raise TransferError(_say(error)) from error
    with response:
        yield _read_response(response, start, timeout)


def list_store(scheme: str, pattern: str, *, timeout: float) -> list[str]:
    """Return the paths in a store that match a glob pattern. Raise `TransferError`."""
    return _ask(_store(scheme), "glob", pattern, timeout=timeout)


def _read_response(response: http.client.HTTPResponse, start: int, timeout: float) -> Stream:
    length, tag = response.headers.get("Content-Length"), response.headers.get("ETag")
    size, begin = int(length) if length and length.isdigit() else None, 0
    if response.status == http.HTTPStatus.PARTIAL_CONTENT:
        match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if not match or int(match[1]) != start:
            raise TransferError("the server sent another part of the file than was asked for")
        begin, size = start, int(match[2])
    elif response.status != http.HTTPStatus.OK:
        raise TransferError(f"the server answered {response.status} {response.reason}", final=True)
    strong = tag if tag and not tag.startswith("W/") else None
    return Stream(begin, size, strong, _read_chunks(response, timeout))


def _read_chunks(response: http.client.HTTPResponse, timeout: float) -> Iterator[bytes]:
    """Yield chunks; each read waits at most `timeout` seconds. Raise `TransferError` below `SLOWEST` bytes/s."""
    mark, arrived = time.monotonic(), 0
    while True:
        try:
            chunk = response.read1(CHUNK)
        except _BROKEN as error:
            raise TransferError(_say(error)) from error
        if not chunk:
            return
        arrived += len(chunk)
        if (spent := time.monotonic() - mark) > timeout:
            if arrived < SLOWEST * spent:
                raise TransferError(f"the server stalls: {arrived:,} bytes in {spent:.0f} s")
            mark, arrived = time.monotonic(), 0
        yield chunk


def _open_store(scheme: str, url: str, start: int, timeout: float) -> Stream:
    store, path = _store(scheme), url.partition("://")[2]
    size = int(_ask(store, "info", path, timeout=timeout)["size"])

    def chunks() -> Iterator[bytes]:
        for begin in range(start, size, PART):
            yield _ask(store, "cat_file", path, start=begin, end=min(begin + PART, size), timeout=timeout)

    return Stream(start, size, None, chunks())


def _store(scheme: str) -> fsspec.AbstractFileSystem:
    assert scheme in STORES
    try:
        return fsspec.filesystem(scheme)
    except ImportError as error:
        raise ConfigError(f"{scheme}:// needs a package: {error}", "pip install 'maedistill[remote]'") from error


def _ask(store: fsspec.AbstractFileSystem, method: str, *arguments: Any, timeout: float, **keywords: Any) -> Any:
    """Call a method of a store. `timeout` applies to asynchronous stores only; the others have limits of their own."""
    try:
        if store.async_impl:
            return sync(store.loop, getattr(store, f"_{method}"), *arguments, timeout=timeout, **keywords)
        return getattr(store, method)(*arguments, **keywords)
    except FileNotFoundError as error:
        raise MissingError("it does not exist", final=True) from error
    except TimeoutError as error:
        raise TransferError(f"no answer within {timeout:g} s") from error
    except PermissionError as error:
        raise MissingError(f"access is denied ({_say(error)})", final=True) from error
    except Exception as error:  # each store's client has its own exceptions, without a common base class
        raise TransferError(_say(error)) from error


def _status_error(code: int, reason: str) -> TransferError:
    what = f"the server answered {code} {reason}"
    if code in (*_ABSENT, *_FORBIDDEN):
        return MissingError(what, final=True)
    return TransferError(what, final=code < 500 and code not in _TRY_AGAIN)


def _say(error: Exception) -> str:
    reason = getattr(error, "reason", None)  # the exception that a URLError wraps
    return f"{type(reason).__name__}: {reason}" if isinstance(reason, Exception) else f"{type(error).__name__}: {error}"


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to web addresses only, and never from https to http."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if urlsplit(newurl).scheme not in (("https",) if req.type == "https" else WEB):
            raise TransferError("the server redirects to an address that is not followed", final=True)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _web() -> urllib.request.OpenerDirector:
    """Return an opener for http(s) only; `build_opener` adds ftp:, file: and data:. The environment sets proxies."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        _SafeRedirects(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener
