"""From what a user types to a store."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from urllib.parse import unquote, urlsplit

from ciuic_async.errors import UsageError
from ciuic_async.stores import credentials
from ciuic_async.stores.base import Store
from ciuic_async.stores.local import LocalStore

_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://")


def resolve(url: str | os.PathLike[str], options: Mapping[str, str] | None = None) -> Store:
    """A path, a ``file://`` URL or that of an object store (``s3``, ``gs``, ``az``) as a store.

    Nothing is created or contacted yet.

    Args:
        options: how to reach an object store, by the names of its client (``endpoint``, ``access_key_id``, ...); the
            environment and profiles say what is not here.

    Raises:
        UsageError: an unknown scheme, a URL or an option that is none, or an extra that is not installed.
    """
    text = os.fspath(url)
    if not isinstance(text, str) or not text:
        raise UsageError(f"a chain is a path or URL, found {url!r}")
    if "\0" in text:
        raise UsageError("a path cannot hold a NUL byte")
    match = _SCHEME.match(text)
    scheme = match[1].lower() if match else "file"
    if scheme in credentials.SCHEMES:
        from ciuic_async.stores.object_store import ObjectStore  # who has a local chain needs none of it

        return ObjectStore(credentials.parse_url(text), options)
    if options:
        raise UsageError("storage_options are for object stores, and this is a local path", kind="bad_storage_option")
    if not match:
        return LocalStore(os.path.expanduser(text))
    if scheme == "file":
        return LocalStore(_file_url_path(text))
    raise UsageError(
        f"{match[0]}... is not supported in this version: use a local path, s3://, gs:// or az://",
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
