"""What an option's value may be, and how it is written in a file and in an environment variable.

A variable's text is first turned into what a file would hold (``Kind.from_text``); from there on both are checked
alike (``Kind.check``). What does not fit is a ``WrongValueError`` that says what was expected.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from ciuic_async.errors import UsageError
from ciuic_async.options import STAGING
from ciuic_async.retention import words
from ciuic_async.retention.parse import parse_policy
from ciuic_async.transparency.witnessing import duration_s

_DIGITS = re.compile(r"-?[0-9]{1,18}")
_NUMBER = re.compile(r"-?[0-9]{1,18}(\.[0-9]{0,18})?([eE][+-]?[0-9]{1,3})?")
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_LIMIT_CHARACTERS = 10_000
_LARGEST = 10**15
_NAMES = 1000


class WrongValueError(Exception):
    """A value that an option cannot have; the message says what was expected."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A type of values.

    Attributes:
        name: for tables.
        expected: for messages: "expected ...".
        check: from what a file holds to the value that the keyword argument takes. Raises WrongValueError.
        from_text: from a variable's text, not empty, to what a file would hold; leaves alone what it does not know.
    """

    name: str
    expected: str
    check: Callable[[object], object]
    from_text: Callable[[str], object] = str


def _integer_of(text: str) -> object:
    return int(text) if _DIGITS.fullmatch(text) else text


def _number_of(text: str) -> object:
    return _integer_of(text) if not _NUMBER.fullmatch(text) or _DIGITS.fullmatch(text) else float(text)


def _flag_of(text: str) -> object:
    word = text.lower()
    return True if word in _TRUE else False if word in _FALSE else text


def _grace_of(text: str) -> object:
    flag = _flag_of(text)
    return flag if isinstance(flag, bool) else _number_of(text)


def _policy_of(text: str) -> object:
    """Shells, and whoever strips a variable, take the last line's end away, without which a policy looks cut off."""
    return f"{text}\n" if "\n" in text else text


def _names_of(text: str) -> object:
    return [name.strip() for name in text.split(",") if name.strip()]


def _count(value: object) -> object:
    if type(value) is not int or not 1 <= value <= _LARGEST:
        raise WrongValueError
    return value


def _flag(value: object) -> object:
    if not isinstance(value, bool):
        raise WrongValueError
    return value


def _share(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise WrongValueError
    return float(value)


def _seconds(value: object, *, zero: bool = False) -> object:
    if isinstance(value, str):
        try:
            value = words.read_duration(value, "")
        except UsageError:
            raise WrongValueError from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _LARGEST:
        raise WrongValueError  # NaN, too
    if not value and not zero:
        raise WrongValueError
    return float(value)


def _wait(value: object) -> object:
    return _seconds(value, zero=True)


def _grace(value: object) -> object:
    return value if isinstance(value, bool) else _seconds(value)


def _age(value: object) -> object:
    try:
        return duration_s(value)
    except (UsageError, OverflowError):
        raise WrongValueError from None


def _memory(value: object) -> object:
    if isinstance(value, str):
        try:
            value = words.read_size(value, "")
        except UsageError:
            raise WrongValueError from None
    if type(value) is not int or not STAGING.minimum_bytes <= value <= _LARGEST:
        raise WrongValueError
    return value


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.strip() or "\0" in value or len(value) > _LIMIT_CHARACTERS:
        raise WrongValueError
    return value


def _policy(value: object) -> object:
    try:
        return parse_policy(_text(value))
    except UsageError as error:
        raise WrongValueError(str(error)) from None


def _patterns(value: object) -> object:
    if not isinstance(value, list) or len(value) > _NAMES:
        raise WrongValueError
    return tuple(_text(item) for item in value)


def _path(value: object) -> object:
    """One line; a text of several lines is no path."""
    text = _text(value)
    if "\n" in text:
        raise WrongValueError
    return text


def _ordering(value: object) -> object:
    text = _text(value)
    if text not in ("local", "object-store") and not re.match(r"etcds?://[^/]", text):
        raise WrongValueError
    return text


def choice(*allowed: str) -> Kind:
    """One of some words."""

    def check(value: object) -> object:
        if value not in allowed or not isinstance(value, str):
            raise WrongValueError
        return value

    return Kind("word", "one of " + ", ".join(f'"{word}"' for word in allowed), check)


COUNT = Kind("integer", "a whole number of at least 1", _count, _integer_of)
FLAG = Kind("boolean", "true or false (in a variable also 1, 0, yes, no, on, off)", _flag, _flag_of)
SHARE = Kind("number", "a share between 0 and 1, e.g. 0.01 for one percent", _share, _number_of)
SECONDS = Kind("duration", "seconds above 0, or a text such as 90s, 30m, 2h, 1d", _seconds, _number_of)
WAIT = Kind("duration", "seconds, 0 or more, or a text such as 90s or 5m", _wait, _number_of)
GRACE = Kind("boolean or duration", "true, false, or seconds such as 25 or 2m", _grace, _grace_of)
AGE = Kind("duration", "seconds above 0, or a text such as 90s, 30m, 1h, 2d", _age, _number_of)
MEMORY = Kind(
    "size", f"bytes, or a text such as 2GiB or 500MB, at least {STAGING.minimum_bytes >> 20} MiB", _memory, _integer_of
)
POLICY = Kind("rules", "rules such as latest=3 | best=loss", _policy)
PATTERNS = Kind(
    "list of patterns", 'a list such as ["model.trunk.*"] (in a variable with commas)', _patterns, _names_of
)
PATH = Kind("path", "a path", _path)
PATH_OR_TEXT = Kind("path or text", "the path of a policy file, or its text", _text, _policy_of)
PLACE = Kind("path or URL", "a path or URL", _path)
ORDERING = Kind("word or URL", '"local", "object-store" or etcd://host:port,host:port/prefix', _ordering)


def has_secret(kind: Kind, value: object) -> bool:
    """Whether a value holds what belongs into no file that is shared: a signing key, or a URL with a password."""
    if not isinstance(value, str):
        return False
    if kind is PATH:
        return "-SECRET+" in value.upper()
    if kind in (ORDERING, PLACE) and "://" in value:
        try:
            return ":" in urlsplit(value).netloc.rpartition("@")[0]
        except ValueError:
            return "@" in value
    return False
