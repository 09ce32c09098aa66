"""Which part of the engine worked when: spans of time, taken where stages call each other.

Only for pictures. Every traced call costs a microsecond or two, so no figure that is published comes from here.
"""

from __future__ import annotations

import functools
import importlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ciuic_async.codecs.choose import encoder_for

POINTS = (
    ("gate", "ciuic_async.overlap", "Overlap.pass_gate"),
    ("stage", "ciuic_async.overlap", "Overlap.copy"),
    ("stage", "ciuic_async.pipeline.capture_stage", "stage"),
    ("digest", "ciuic_async.pipeline.persist", "digest"),
    ("write", "ciuic_async.segments.writer", "SegmentWriter.append"),
    ("write", "ciuic_async.segments.writer", "SegmentWriter.finish"),
    ("commit", "ciuic_async.pipeline.persist", "commit"),
)
"""(lane, module, function or method). What a version of the engine does not have is left out of its picture."""


@dataclass(slots=True)
class Trace:
    """Spans as (lane, begin, end, thread); seconds of ``perf_counter``. Any thread adds to it."""

    spans: list[tuple[str, float, float, str]] = field(default_factory=list)
    found: list[str] = field(default_factory=list)

    def add(self, lane: str, begin_s: float, end_s: float) -> None:
        self.spans.append((lane, begin_s, end_s, threading.current_thread().name))

    @contextmanager
    def span(self, lane: str) -> Iterator[None]:
        begin_s = time.perf_counter()
        try:
            yield
        finally:
            self.add(lane, begin_s, time.perf_counter())

    def around(self, lane: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, with a span for every call."""

        @functools.wraps(function)
        def traced(*arguments: Any, **options: Any) -> Any:
            with self.span(lane):
                return function(*arguments, **options)

        return traced


@contextmanager
def tracing(codec: str, points: Sequence[tuple[str, str, str]] = POINTS) -> Iterator[Trace]:
    """Put spans around the engine's own functions, and take them away again. ``codec`` tells whose ``encode``."""
    encoder = type(encoder_for(codec))
    points = [*points, ("encode", encoder.__module__, f"{encoder.__qualname__}.encode")]
    trace = Trace()
    undo: list[Callable[[], None]] = []
    try:
        for lane, module, name in points:
            try:
                owner: Any = importlib.import_module(module)
            except ModuleNotFoundError:
                continue
            *classes, attribute = name.split(".")
            for part in classes:
                owner = getattr(owner, part, None)
            original = getattr(owner, attribute, None)
            if original is None:
                continue
            setattr(owner, attribute, trace.around(lane, original))
            undo.append(functools.partial(setattr, owner, attribute, original))
            trace.found.append(f"{lane}: {module}.{name}")
        yield trace
    finally:
        for restore in reversed(undo):
            restore()
