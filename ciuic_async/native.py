"""The compiled core, where it was built: the one place that imports it.

``CIUIC_ASYNC_NATIVE=0`` in the environment switches it off. Results are the same without it, only slower.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType

ENVIRONMENT_VARIABLE = "CIUIC_ASYNC_NATIVE"


def _load() -> tuple[ModuleType | None, str]:
    if os.environ.get(ENVIRONMENT_VARIABLE) == "0":
        return None, f"switched off by {ENVIRONMENT_VARIABLE}=0"
    try:
        return importlib.import_module("ciuic_async._native"), ""
    except ModuleNotFoundError:
        return None, "not built"
    except ImportError as error:  # built for another system: slower is better than not at all
        return None, f"cannot be loaded: {error}"


core: ModuleType | None
core, _missing_because = _load()


def describe() -> str:
    """One line for people: what is in use, or why not."""
    if core is None:
        return f"plain Python (native core {_missing_because})"
    if not core.zstd_available():
        return "native core, without libzstd.so.1 (the zstandard package compresses)"
    version = core.zstd_version()
    return f"native core, zstd {version // 10000}.{version // 100 % 100}.{version % 100}"
