"""Bytes from far away: one attempt to read one file over HTTP, S3, Google Cloud Storage or the Hugging Face hub.

    URL -> open_stream -> Stream(start, size, tag, chunks)          every wait is bounded; what fails is a TransferError

HTTP is Python's own urllib, so that nothing need be installed; the others are fsspec file systems. Only the schemes
below exist here: a URL is never handed to a library that would look for commands or chains of protocols in it.
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
PART = 16 << 20  # bytes per request to a store: one must arrive within the time-out
SLOWEST = 1024  # bytes per second; a server that sends less counts as stalled

_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+)")
_TRY_AGAIN = (408, 425, 429)  # of the 4xx codes; all 5xx are tried again too
_ABSENT, _FORBIDDEN = (404, 410), (401, 403)
_BROKEN = (OSError, http.client.HTTPException)  # of a web connection; URLError and time-outs are OSErrors


class TransferError(Exception):
    """One attempt failed; the message says how. `final`: another try cannot help."""

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
    """There is no such file, or this user may not see it."""


class Stream(NamedTuple):
    """A file that is arriving."""

    start: int  # byte of the file that `chunks` begin with: the one asked for, or 0
    size: int | None  # bytes of the whole file, where the server tells
    tag: str | None  # changes whenever the file does (a strong ETag)
    chunks: Iterator[bytes]


@contextmanager
def open_stream(
    url: str, *, start: int = 0, last: int | None = None, tag: str | None = None, timeout: float
) -> Iterator[Stream]:
    """Opens a remote file from the byte `start` on, up to the byte `last`; whole if the server cannot do parts.

    tag: continue only the file that had this tag, else begin again. Raises `TransferError`, also out of `chunks`.
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
    """Paths in a store that a glob pattern matches. Raises `TransferError`."""
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
    """Each read waits for `timeout` at most; a server that only drips is refused by its speed."""
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
    """Calls a method of a store, within `timeout` where the store is asynchronous; others have limits of their own."""
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
    except Exception as error:  # each store's client has exceptions of its own, without a common base
        raise TransferError(_say(error)) from error


def _status_error(code: int, reason: str) -> TransferError:
    what = f"the server answered {code} {reason}"
    if code in (*_ABSENT, *_FORBIDDEN):
        return MissingError(what, final=True)
    return TransferError(what, final=code < 500 and code not in _TRY_AGAIN)


def _say(error: Exception) -> str:
    reason = getattr(error, "reason", None)  # what a URLError wraps
    return f"{type(reason).__name__}: {reason}" if isinstance(reason, Exception) else f"{type(error).__name__}: {error}"


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows to other web addresses only, and never from https to http."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if urlsplit(newurl).scheme not in (("https",) if req.type == "https" else WEB):
            raise TransferError("the server redirects to an address that is not followed", final=True)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _web() -> urllib.request.OpenerDirector:
    """Not `build_opener`, which would add ftp:, file: and data:. Proxies are those of the environment."""
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
