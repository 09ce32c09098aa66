"""Configuration files: where they lie, and what they hold. They are input like any other: bounded, never trusted.

A file that was found, and not named, must be this user's: a folder such as ``/tmp`` may hold somebody else's, which
would choose the signing key or where copies go. For the same reason none is read inside a chain: whose word counts
never comes from the place that is checked.
"""

from __future__ import annotations

import json
import os
import re
import stat
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ciuic_async.config.table import CONFIG, TABLES
from ciuic_async.errors import UsageError
from ciuic_async.events import logger
from ciuic_async.format import layout
from ciuic_async.user_folders import config_folder

NAME, JSON_NAME = "ciuic.toml", "ciuic.json"
LIMIT_BYTES = 64 << 10
_MOST_DOTS = 500
_HINT = f"{CONFIG}= (empty) reads no file"


@dataclass(frozen=True, slots=True)
class File:
    """A file that was read. ``values`` by the option's whole name; unknown tables are kept whole."""

    path: Path
    shown: str
    values: Mapping[str, object]
    lines: Mapping[str, int] = field(default_factory=dict)

    def where(self, name: str) -> str:
        """``path:line`` of a key; the path alone where the line is not known."""
        line = self.lines.get(name)
        return self.shown if line is None else f"{self.shown}:{line}"


def find(environment: Mapping[str, str]) -> list[File]:
    """The files that count here, strongest first: the one that ``CIUIC_CONFIG`` names, else those that are found.

    Found are ``ciuic.toml`` (or ``ciuic.json``) in the working directory, then ``ciuic/ciuic.toml`` in
    ``$XDG_CONFIG_HOME`` or ``~/.config``.

    Raises:
        UsageError: a file cannot be used: kinds ``config_not_found``, ``config_unreadable``, ``config_too_large``,
            ``config_not_yours``, ``config_malformed``.
    """
    named = environment.get(CONFIG)
    if named is not None:
        if not named.strip():
            return []
        path = Path(os.path.abspath(os.path.expanduser(named)))
        file = _read(path, named=True)
        if file is None:
            raise UsageError(
                f"{CONFIG}={named}: there is no such file; {_HINT}", kind="config_not_found", where=str(path)
            )
        return [file]
    return [file for path in _places(environment) if (file := _read(path, named=False)) is not None]


def _places(environment: Mapping[str, str]) -> Iterator[Path]:
    try:
        here = Path.cwd()
    except OSError:  # it was deleted
        here = None
    if here is not None:
        candidates = [here / NAME, here / JSON_NAME]
        present = [path for path in candidates if os.path.lexists(path)]
        chain = _chain_around(here)
        if chain is not None:
            present = [path for path in present if path.name == NAME]  # ciuic.json is the chain's own
            if present:
                logger.warning(
                    "%s lies inside the chain %s and is not read: whose word counts never comes from a chain; "
                    "name it with %s if you mean it",
                    present[0],
                    chain,
                    CONFIG,
                )
        elif present:
            yield present[0]
    of_user = config_folder("ciuic", NAME, environment=environment)
    if of_user is not None:
        yield Path(of_user)


def _chain_around(folder: Path) -> Path | None:
    """The chain that a folder is, or lies in."""
    for place in (folder, *folder.parents):
        if (place / layout.CHAIN_FILE).is_file() and (place / layout.SLOTS).is_dir():
            return place
    return None


def _read(path: Path, *, named: bool) -> File | None:
    """A file's content; None where there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe must not be waited for
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if not named and isinstance(error, PermissionError) and path.parent.name == "ciuic":
            return None  # the home folder of somebody else, as in containers
        raise _unreadable(path, os.strerror(error.errno or 0)) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise _unreadable(path, "not a regular file")
        if not named:
            _check_owner(path, status)
            _check_link(path)
        data = b""
        while len(data) <= LIMIT_BYTES and (piece := os.read(descriptor, LIMIT_BYTES + 1 - len(data))):
            data += piece
    except OSError as error:
        raise _unreadable(path, os.strerror(error.errno or 0)) from error
    finally:
        os.close(descriptor)
    if len(data) > LIMIT_BYTES:
        raise UsageError(
            f"{path}: more than {LIMIT_BYTES} bytes: no configuration; {_HINT}",
            kind="config_too_large",
            where=str(path),
        )
    return _parse(path, data)


def _check_owner(path: Path, status: os.stat_result) -> None:
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & stat.S_IWOTH:
        reason = "everybody may write to it" if status.st_mode & stat.S_IWOTH else f"it belongs to user {status.st_uid}"
        raise UsageError(
            f"{path}: {reason}, and it was only found here: it is not used unless you name it with {CONFIG}={path}; "
            f"{_HINT}",
            kind="config_not_yours",
            where=str(path),
        )


def _check_link(path: Path) -> None:
    """A link that somebody else made may lead to a file of ours, whose paths would then be meant from this folder."""
    owner = os.lstat(path).st_uid
    if owner not in (0, os.geteuid()):
        raise UsageError(
            f"{path}: it is a link of user {owner}, and was only found here: it is not used unless you name it with "
            f"{CONFIG}={path}; {_HINT}",
            kind="config_not_yours",
            where=str(path),
        )


def _unreadable(path: Path, reason: str) -> UsageError:
    return UsageError(f"{path}: cannot be read: {reason}; {_HINT}", kind="config_unreadable", where=str(path))


def _parse(path: Path, data: bytes) -> File:
    try:
        text = data.decode("utf-8-sig")
        if path.suffix == ".json":
            content = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
        else:
            _check_keys(text)
            content = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        reason = str(error) if not isinstance(error, RecursionError | UnicodeDecodeError) else "not text of this form"
        raise UsageError(
            f"{path}: {reason}: expected {'JSON' if path.suffix == '.json' else 'TOML'}; {_HINT}",
            kind="config_malformed",
            where=str(path),
        ) from error
    if not isinstance(content, dict):
        raise UsageError(
            f"{path}: expected a table of options, found {type(content).__name__}",
            kind="config_malformed",
            where=str(path),
        )
    values: dict[str, object] = {}
    for name, value in content.items():
        if name in TABLES and isinstance(value, dict):
            values |= {f"{name}.{key}": item for key, item in value.items()}
        else:
            values[name] = value
    return File(path, _relative(path), values, _lines(text))


def _check_keys(text: str) -> None:
    """tomllib takes time by the square of a dotted key's parts."""
    if any(line.count(".") > _MOST_DOTS for line in text.splitlines()):
        raise ValueError(f"a line with more than {_MOST_DOTS} dots")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands there twice")
    return result


def _refuse(text: str) -> object:
    raise ValueError(f"{text} is no number")


def _relative(path: Path) -> str:
    """As short as it can be said from here."""
    try:
        return str(path.relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(path)


_KEY = re.compile(r"""\s*["']?([\w.-]{1,100})["']?\s*[=:]""")
_TABLE = re.compile(r"\s*\[\s*([\w.-]{1,100})\s*\]")


def _lines(text: str) -> dict[str, int]:
    """Where keys stand, for messages only: a key in the middle of a text of several lines may be taken for one."""
    lines: dict[str, int] = {}
    table = ""
    for number, line in enumerate(text.splitlines(), 1):
        if match := _TABLE.match(line):
            table = f"{match[1]}."
        elif match := _KEY.match(line):
            name = match[1]
            if line.rstrip().endswith("{") and name in TABLES:
                table = f"{name}."
            lines.setdefault(table + name, number)
        elif line.strip().startswith("}"):
            table = ""
    return lines
