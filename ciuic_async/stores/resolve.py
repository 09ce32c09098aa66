"""From what a user types to a store."""

from __future__ import annotations

import os
import re
from urllib.parse import unquote, urlsplit

from ciuic_async.errors import UsageError
from ciuic_async.stores.base import Store
from ciuic_async.stores.hdfs import HdfsStore
from ciuic_async.stores.local import LocalStore

_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://")


def resolve(url: str | os.PathLike[str]) -> Store:
    """A path or ``file://`` URL as a store. Nothing is created or contacted yet.

    Raises:
        UsageError: an unknown scheme.
    """
    text = os.fspath(url)
    if not isinstance(text, str) or not text:
        raise UsageError(f"a chain is a path or URL, found {url!r}")
    if "\0" in text:
        raise UsageError("a path cannot hold a NUL byte")
    match = _SCHEME.match(text)
    if not match:
        return LocalStore(os.path.expanduser(text))
    if match[1].lower() == "file":
        return LocalStore(_file_url_path(text))
    if match[1].lower() == "hdfs":
        return HdfsStore(text)
    raise UsageError(
        f"{match[0]}... is not supported in this version: use a local path or hdfs://; object stores are not built yet",
        kind="unknown_scheme",
    )


def _file_url_path(url: str) -> str:
    """The absolute path that a ``file://`` URL names; what it cannot mean is refused rather than guessed."""
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise UsageError(f"{url!r} is no URL: {error}") from error
    path = unquote(parts.path)
    if parts.netloc not in ("", "localhost") or not path or "\0" in path:
        raise UsageError(f"{url!r} is not a local place: expected file:///absolute/path")
    if parts.query or parts.fragment:
        raise UsageError(f"{url!r}: write '?' as %3F and '#' as %23 in a file URL, or use the plain path")
    return path
