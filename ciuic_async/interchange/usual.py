"""The names that plain checkpoint files usually have, out and in. No torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_STATE_DICT = "_state_dict"
OBJECTS = ("model", "optimizer", "scheduler", "scaler", "ema")
"""Items of a state that are usually called ``model_state_dict`` and so on in a file."""
STEP_KEYS = ("step", "global_step", "iteration", "iter", "steps", "num_steps", "ciuic.step")
EPOCH_KEYS = ("epoch", "current_epoch", "epochs_run")
BATCH_KEYS = ("batch_idx", "batch")
METRIC_KEYS = (
    "loss",
    "train_loss",
    "val_loss",
    "best_loss",
    "accuracy",
    "acc",
    "train_accuracy",
    "val_accuracy",
    "val_acc",
    "best_accuracy",
    "best_acc",
    "perplexity",
    "lr",
)
_MAX_METRICS = 32
_SAFE_INTEGER = 2**53
_NUMBERED = re.compile(r"(step|steps|iter|iteration|global[_-]?step)[-_=.]?([0-9]{1,15})", re.IGNORECASE)
_EPOCH = re.compile(r"(?:epoch|ep)[-_=.]?([0-9]{1,15})", re.IGNORECASE)
_DIGITS = re.compile(r"([0-9]{1,1000})")


def usual(state: Any, progress: Mapping[str, Any]) -> Any:
    """A state as a plain file has it: ``model`` is ``model_state_dict``, and progress lies beside it.

    Args:
        progress: epoch, batch, step, loss: what is not None is added.

    Returns:
        The same, if it is no dict with text keys. Nothing in it is ever replaced.
    """
    if type(state) is not dict or not all(type(key) is str for key in state):
        return state
    result: dict[str, Any] = {name: value for name, value in progress.items() if value is not None}
    result = {name: value for name, value in result.items() if name not in state}
    for name, value in state.items():
        other = f"{name}{_STATE_DICT}"
        renames = name in OBJECTS and isinstance(value, dict) and other not in state
        result[other if renames else name] = value
    return result


@dataclass(frozen=True, slots=True)
class Facts:
    """What a file says of the training that it is of; None and empty where it says nothing."""

    step: int | None = None
    epoch: int | None = None
    batch: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)


def facts(state: Any, path: Path) -> Facts:
    """What is found under the usual keys of a state, else in the file's name."""
    top: Mapping[Any, Any] = state if isinstance(state, dict) else {}
    texts = top.get("__metadata__")
    if isinstance(texts, dict):
        top = {**texts, **top}
    step, epoch = _first(top, STEP_KEYS), _first(top, EPOCH_KEYS)
    if step is None and (match := _NUMBERED.search(path.stem)):
        step = int(match[2])
    if epoch is None and (match := _EPOCH.search(path.stem)):
        epoch = int(match[1])
    return Facts(step, epoch, _first(top, BATCH_KEYS), _metrics(top))


def _first(top: Mapping[Any, Any], keys: tuple[str, ...]) -> int | None:
    for key in keys:
        value = top.get(key)
        if isinstance(value, str) and re.fullmatch("[0-9]{1,15}", value):
            return int(value)
        if type(value) is int and 0 <= value < _SAFE_INTEGER:
            return value
        number = _number(value)
        if number is not None and number == int(number) and 0 <= number < _SAFE_INTEGER:
            return int(number)
    return None


def _metrics(top: Mapping[Any, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    inner = top.get("metrics")
    for source, names in ((inner, list(inner) if isinstance(inner, dict) else []), (top, METRIC_KEYS)):
        for name in names:
            number = _number(source.get(name)) if isinstance(source, dict) else None
            if number is not None and type(name) is str and name and len(name) <= 200 and name.isprintable():
                found[name] = number
    return dict(list(found.items())[:_MAX_METRICS])


def _number(value: Any) -> float | None:
    """A finite number, also of numpy, or a tensor of one that has its data here."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return None
    if not isinstance(value, int | float):
        if getattr(value, "ndim", None) != 0 or getattr(value, "is_meta", False) or not hasattr(value, "item"):
            return None
        try:
            value = value.item()
        except RuntimeError:  # of an element type that torch has no numbers for
            return None
        if not isinstance(value, int | float):
            return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def natural(path: Path) -> tuple[tuple[int, int, str], ...]:
    """Sorts ``ckpt-9`` before ``ckpt-10``."""
    pieces = _DIGITS.split(str(path))
    return tuple((1, int(piece), "") if place % 2 else (0, 0, piece) for place, piece in enumerate(pieces))


def ordered(found: Mapping[Path, Facts]) -> list[Path]:
    """Files in the order of the training: by step if all have one, else by epoch and batch if all do, else by name."""
    paths = sorted(found, key=natural)
    if all(found[path].step is not None for path in paths):
        return sorted(paths, key=lambda path: (found[path].step or 0, found[path].epoch or 0, found[path].batch or 0))
    if all(found[path].epoch is not None for path in paths):
        return sorted(paths, key=lambda path: (found[path].epoch or 0, found[path].batch or 0))
    return paths
