"""What users hand over, checked: every wrong argument is refused with what was expected and found."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from ciuic_async.errors import UsageError
from ciuic_async.format.entry import MAX_METRICS, Position
from ciuic_async.format.jsontext import MAX_SAFE_INTEGER
from ciuic_async.options import PREEMPTION

MAX_TEXT = 10_000
"""Characters of a remark: a log entry holds at most 65535 bytes."""


def check_grace(preemption: Any) -> float | None:
    """``preemption`` as seconds of grace; None: off."""
    if preemption is False or preemption is None:
        return None
    if threading.current_thread() is not threading.main_thread():
        raise UsageError(
            "preemption: signal handlers can only be set on the main thread; make the Checkpointer there",
            kind="not_main_thread",
        )
    if preemption is True:
        return PREEMPTION.grace_s
    check_number("preemption", preemption)
    return float(preemption)


def check_patterns(patterns: Any) -> tuple[str, ...]:
    """``frozen`` as a tuple of patterns."""
    if isinstance(patterns, str) or not all(isinstance(pattern, str) for pattern in patterns):
        raise UsageError(f"frozen={patterns!r}: expected a sequence of patterns, e.g. ('model.trunk.*',)")
    return tuple(patterns)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a word that is none of ``choices``."""
    if value not in choices:
        raise UsageError(f"{name}={value!r}: expected one of {', '.join(map(repr, choices))}")


def check_number(name: str, value: Any, *, whole: bool = False, zero: bool = False) -> None:
    """Refuse what is no number above 0 (``zero``: or 0), or None; ``whole``: integers only."""
    kinds = (int,) if whole else (int, float)
    if value is None or (
        isinstance(value, kinds) and not isinstance(value, bool) and (value > 0 or (zero and not value))
    ):
        return
    expected = ("an integer" if whole else "a number") + (" of at least 0" if zero else " above 0")
    raise UsageError(f"{name}={value!r}: expected {expected}")


def check_policy(keep: Any) -> None:
    """Refuse what is no retention policy, e.g. a bare number."""
    if keep is not None and not (callable(getattr(keep, "keep", None)) and callable(getattr(keep, "describe", None))):
        raise UsageError(f"keep={keep!r}: expected a policy such as KeepLatest(3), or None to keep all")


def check_state(state: Mapping[str, Any]) -> MutableMapping[str, Any]:
    """The state mapping, or a copy of it where it cannot change."""
    if not isinstance(state, Mapping) or not state:
        raise UsageError("state: expected a mapping of names to objects, e.g. {'model': model, 'optimizer': optimizer}")
    for name in state:
        if type(name) is not str or not name:
            raise UsageError(f"state: names are texts, found {name!r}")
    return state if isinstance(state, MutableMapping) else dict(state)


def check_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a run was started with, as a dict. Raises UsageError."""
    if not isinstance(config, Mapping):
        raise UsageError(f"config={config!r}: expected a mapping of names to plain values, e.g. vars(args)")
    return dict(config)


def check_tags(tags: Sequence[str]) -> tuple[str, ...]:
    """Tags as they are recorded. Raises UsageError."""
    if isinstance(tags, str):
        raise UsageError(f"tags={tags!r}: expected a list of tags, found one text")
    for tag in tags:
        if type(tag) is not str or not tag or len(tag) > 200 or not tag.isprintable():
            raise UsageError(f"tag {tag!r}: expected 1 to 200 printable characters")
    return tuple(tags)


def check_tag(name: str) -> str:
    """A tag that can be used as a ref. Raises UsageError."""
    check_tags([name])
    if name == "latest" or name.startswith(("step:", "best:")) or "~" in name:
        raise UsageError(f"tag {name!r}: means something else as a ref; choose a name without '~', 'step:' or 'best:'")
    return name


def check_text(name: str, value: str) -> str:
    """A remark that a log entry holds. Raises UsageError."""
    if type(value) is not str or len(value) > MAX_TEXT:
        raise UsageError(f"{name}: expected a text of at most {MAX_TEXT} characters")
    if any("\ud800" <= character <= "\udfff" for character in value):  # from bytes that are no UTF-8
        raise UsageError(f"{name}: expected a text in UTF-8, found {value[:80]!r}")
    return value


def check_metrics(metrics: Mapping[str, Any] | None) -> tuple[tuple[str, str], ...]:
    """Metrics as (name, shortest decimal that reads back to the same number), sorted."""
    if not metrics:
        return ()
    result = []
    for name, value in metrics.items():
        if type(name) is not str or not name or len(name) > 200 or not name.isprintable():
            raise UsageError(f"metric {name!r}: expected a name of 1 to 200 printable characters")
        try:
            number = float(
                value.detach() if hasattr(value, "detach") else value
            )  # torch warns of tensors with gradients
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise UsageError(f"metric {name!r}: expected a number, found {type(value).__name__}: {error}") from None
        result.append((name, repr(int(number)) if _is_small_integer(value, number) else repr(number)))
    if len(result) > MAX_METRICS:
        raise UsageError(f"{len(result)} metrics, at most {MAX_METRICS} can be recorded with a snapshot")
    return tuple(sorted(result))


def _is_small_integer(value: Any, number: float) -> bool:
    return isinstance(value, int) and math.isfinite(number) and abs(number) <= MAX_SAFE_INTEGER


def position(value: Any) -> Position:
    """Epoch or batch for the log entry, where only integers and short texts fit; the manifest has it verbatim."""
    if type(value) is int and abs(value) <= MAX_SAFE_INTEGER:
        return value
    if type(value) is str and len(value) <= 1000 and value.isprintable():
        return value
    return None
