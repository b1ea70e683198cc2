"""Check a URL, and make one attempt to read its file over HTTP, S3, Google Cloud Storage or the Hugging Face hub.

    URL -> open_stream -> UrlStream(start, size, tag, chunks)      every wait is limited; failures are TransferErrors

HTTP uses Python's urllib, so that it needs no extra package; the other schemes use fsspec. Only the schemes below are
accepted: a URL never reaches a library that would interpret commands or chains of protocols in it.
"""

import http.client
import re
import string
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

import fsspec
from fsspec.asyn import sync

from maedistill.errors import ConfigError, require_no_secret

WEB, STORES = ("http", "https"), ("s3", "gs", "hf")
CHUNK = 1 << 20  # bytes per read of a web response
PART = 16 << 20  # bytes per request to a store; each request must finish within the timeout
SLOWEST = 1024  # bytes per second; a slower server counts as stalled

_URL = re.compile(r"\s*[A-Za-z][A-Za-z0-9+.-]+:")
_PLAIN = re.compile(r"([a-z0-9]+)://([^/\s]+)/[^\s]*")
_LENGTH = r"([0-9]{1,18})"  # int() also takes other digits, and fails on very many
_CONTENT_RANGE = re.compile(rf"bytes {_LENGTH}-{_LENGTH}/{_LENGTH}")
_TRY_AGAIN = (408, 425, 429)  # retryable 4xx codes; all 5xx codes are retried too
_DENIED = (401, 403)
_MISSING = (*_DENIED, 404, 410)
_BROKEN = (OSError, http.client.HTTPException)  # errors of a web connection; URLError and timeouts are OSErrors


class TransferError(Exception):
    """One failed attempt, with a message that says how it failed. `final`: a retry cannot help."""

    def __init__(
        self,
        message: str,
        *,
        final: bool = False,
        remedy: str = "check the address, the rights and the network, then start again: what has arrived is kept",
    ) -> None:
        super().__init__(message)
        self.final, self.remedy = final, remedy


class MissingError(TransferError):
    """The file does not exist, or the user has no access to it."""


class DeniedError(MissingError):
    """The user has no access to the file; some stores report this for files that do not exist."""


class UrlStream(NamedTuple):
    """A remote file that is being read."""

    start: int  # offset in the file at which `chunks` begin: the requested one, or 0
    size: int | None  # bytes of the whole file, if the server states them
    tag: str | None  # strong ETag, which changes whenever the file does
    chunks: Iterator[bytes]


def is_url(text: str) -> bool:
    """Return whether any library might take the text for a URL, including `PIPE:x` and ` pipe:x`."""
    return bool(_URL.match(text))


def check_url(url: str) -> None:
    """Raise `ConfigError` unless this is a plain URL with a known scheme."""
    schemes = ", ".join(f"{scheme}://" for scheme in (*WEB, *STORES))
    match = _PLAIN.fullmatch(url)
    if not match or match[1] not in (*WEB, *STORES):
        raise ConfigError(f"{url!r} is not an address of shards", f"use a path or one of {schemes}")
    require_no_secret(url, repr(url))
    if "::" in url:
        raise ConfigError(f"{url!r} is a chain of protocols", f"give one plain address: {schemes}")
    if match[1] in WEB and ("@" in match[2] or re.search(r"[?#]", url)):
        raise ConfigError(
            "a web address of shards has a user name, a query (?) or a fragment (#)",
            "use a plain address; for shards that need credentials s3://, gs:// or hf:// with the environment's own",
        )


@contextmanager
def open_stream(
    url: str, *, start: int = 0, last: int | None = None, tag: str | None = None, timeout: float
) -> Iterator[UrlStream]:
    """Open the byte range from `start` to `last` (inclusive) of a remote file.

    The stream begins at byte 0 if the server does not support ranges. A store is read up to the end of the file.
    tag: resume only if the file still has this tag, else begin again. Raise `TransferError`, also from `chunks`.
    """
    scheme, _, path = url.partition("://")
    if scheme in STORES:
        size = int(ask_store(scheme, "info", path, timeout=timeout)["size"])
        parts = ((begin, min(begin + PART, size)) for begin in range(start, size, PART))
        read = (ask_store(scheme, "cat_file", path, start=begin, end=end, timeout=timeout) for begin, end in parts)
        yield UrlStream(start, size, None, read)
        return
    headers = {"Accept-Encoding": "identity", "User-Agent": "maedistill"}
    if start or last is not None:
        headers["Range"] = f"bytes={start}-{'' if last is None else last}"
    if start and tag:
        headers["If-Range"] = tag
    try:
        plain = urlsplit(url)._replace(path=quote(urlsplit(url).path, safe=string.punctuation)).geturl()
        response = _web().open(urllib.request.Request(plain, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        with error:
            message = f"the server answered {error.code} {error.reason}"
            if error.code in _MISSING:
                raise (DeniedError if error.code in _DENIED else MissingError)(message, final=True) from error
            raise TransferError(message, final=error.code < 500 and error.code not in _TRY_AGAIN) from error
    except _BROKEN as error:
        raise TransferError(_describe(error)) from error
    except ValueError as error:  # this is no address, or the server redirects to what is none
        raise TransferError(_describe(error), final=True) from error
    with response:
        yield _read_response(response, start, timeout)


def _read_response(response: http.client.HTTPResponse, start: int, timeout: float) -> UrlStream:
    length, tag = response.headers.get("Content-Length"), response.headers.get("ETag")
    size, begin = int(length) if length and re.fullmatch(_LENGTH, length) else None, 0
    if response.status == http.HTTPStatus.PARTIAL_CONTENT:
        match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if not match or int(match[1]) != start:
            raise TransferError("the server sent another part of the file than was asked for")
        begin, size = start, int(match[3])
    elif response.status != http.HTTPStatus.OK:
        raise TransferError(f"the server answered {response.status} {response.reason}", final=True)
    strong = tag if tag and not tag.startswith("W/") else None
    return UrlStream(begin, size, strong, _read_chunks(response, timeout))


def _read_chunks(response: http.client.HTTPResponse, timeout: float) -> Iterator[bytes]:
    """Yield chunks; each read waits at most `timeout` seconds. Raise `TransferError` below `SLOWEST` bytes/s."""
    mark, arrived = time.monotonic(), 0
    while True:
        try:
            chunk = response.read1(CHUNK)
        except _BROKEN as error:
            raise TransferError(_describe(error)) from error
        if not chunk:
            return
        arrived += len(chunk)
        if (spent := time.monotonic() - mark) > timeout:
            if arrived < SLOWEST * spent:
                raise TransferError(f"the server stalls: {arrived:,} bytes in {spent:.0f} s")
            mark, arrived = time.monotonic(), 0
        yield chunk


def ask_store(scheme: str, method: str, *arguments: Any, timeout: float, **keywords: Any) -> Any:
    """Call a method of a store. Raise `TransferError`, or `ConfigError` if the store's package is missing.

    timeout: applies to asynchronous stores only; the others have limits of their own.
    """
    assert scheme in STORES
    try:
        store = fsspec.filesystem(scheme)
    except ImportError as error:
        raise ConfigError(f"{scheme}:// needs a package: {error}", "pip install 'maedistill[remote]'") from error
    try:
        if store.async_impl:
            return sync(store.loop, getattr(store, f"_{method}"), *arguments, timeout=timeout, **keywords)
        return getattr(store, method)(*arguments, **keywords)
    except FileNotFoundError as error:
        raise MissingError("it does not exist", final=True) from error
    except TimeoutError as error:
        raise TransferError(f"no answer within {timeout:g} s") from error
    except PermissionError as error:
        raise DeniedError(f"access is denied ({_describe(error)})", final=True) from error
    except Exception as error:  # each store's client has its own exceptions, without a common base class
        raise TransferError(_describe(error)) from error


def _describe(error: Exception) -> str:
    reason = getattr(error, "reason", None)  # what a URLError wraps
    error = reason if isinstance(reason, Exception) else error
    return f"{type(error).__name__}: {error}"


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
    request = urllib.request
    plain = (request.ProxyHandler, request.UnknownHandler, request.HTTPHandler, request.HTTPSHandler)
    for handler in (*plain, request.HTTPDefaultErrorHandler, _SafeRedirects, request.HTTPErrorProcessor):
        opener.add_handler(handler())
    return opener
