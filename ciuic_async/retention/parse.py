"""Policies as text: what ``ciuic prune --keep`` takes, and what prune entries say."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from ciuic_async.errors import UsageError
from ciuic_async.retention import words
from ciuic_async.retention.policy import (
    KeepAny,
    KeepBest,
    KeepBytes,
    KeepDaily,
    KeepEvery,
    KeepHourly,
    KeepLatest,
    KeepTagged,
    KeepWeekly,
    KeepWithin,
    Policy,
)

LIMIT_CHARACTERS = 10_000


def parse_policy(text: str) -> Policy:
    """The policy that a text means: rules such as ``latest=3``, with ``|`` between them.

    ``latest=3``, ``every=1000``, ``best=loss``, ``best=accuracy:largest``, ``best=loss:3``, ``tagged``,
    ``tagged=v*,final``, ``hourly=24``, ``daily=7``, ``weekly=4``, ``within=2d``, ``bytes=100GB``.

    Raises:
        UsageError: none, or with a value that it cannot have; names the rule and what was expected.
    """
    if len(text) > LIMIT_CHARACTERS:
        raise UsageError(f"a policy of {len(text)} characters, expected at most {LIMIT_CHARACTERS}")
    rules = tuple(_rule(part.strip()) for part in text.split("|"))
    return rules[0] if len(rules) == 1 else KeepAny(rules)


def _rule(text: str) -> Policy:
    name, separator, value = text.partition("=")
    name = name.strip()
    if name not in _RULES:
        near = difflib.get_close_matches(name[:40], _RULES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"rules are {', '.join(_RULES)}"
        raise UsageError(f"{text[:80]!r}: no such rule; {hint}")
    if not value and (separator or name != "tagged"):
        raise UsageError(f"{text[:80]!r}: expected a value, e.g. {EXAMPLES[name]}")
    return _RULES[name](value.strip())


def _count(rule: str, value: str) -> int:
    if not (value.isascii() and value.isdigit() and len(value) <= 18):
        raise UsageError(f"{rule}={value[:80]}: expected a whole number, e.g. {EXAMPLES[rule]}")
    return int(value)


def _best(value: str) -> KeepBest:
    metric, *options = value.split(":")
    count, largest = 1, False
    for option in options:
        if option in ("largest", "smallest"):
            largest = option == "largest"
        else:
            count = _count("best", option)
    return KeepBest(words.unquote(metric), count, largest)


def _tagged(value: str) -> KeepTagged:
    return KeepTagged(*(words.unquote(name) for name in value.split(",") if name)) if value else KeepTagged()


_RULES: dict[str, Callable[[str], Policy]] = {
    "latest": lambda value: KeepLatest(_count("latest", value)),
    "every": lambda value: KeepEvery(_count("every", value)),
    "best": _best,
    "tagged": _tagged,
    "hourly": lambda value: KeepHourly(_count("hourly", value)),
    "daily": lambda value: KeepDaily(_count("daily", value)),
    "weekly": lambda value: KeepWeekly(_count("weekly", value)),
    "within": lambda value: KeepWithin(words.read_duration(value, f"within={value[:80]}")),
    "bytes": lambda value: KeepBytes(words.read_size(value, f"bytes={value[:80]}")),
}
EXAMPLES = {
    "latest": "latest=3",
    "every": "every=1000",
    "best": "best=loss, best=accuracy:largest or best=loss:3",
    "tagged": "tagged or tagged=v*",
    "hourly": "hourly=24",
    "daily": "daily=7",
    "weekly": "weekly=4",
    "within": "within=2d",
    "bytes": "bytes=100GB",
}
"""For every rule how it is written; for messages and help."""
