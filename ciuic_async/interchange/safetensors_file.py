"""``.safetensors``: flat names and tensors, and texts beside them."""

from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import Any

import torch

from ciuic_async.errors import UsageError
from ciuic_async.interchange import limits

METADATA = "__metadata__"
"""In a state that was imported: the texts that the file has beside its tensors."""
_OWN = "ciuic."
_VALUES = "ciuic.values"
_MAX_HEADER_BYTES = 100 << 20


def read_safetensors(path: str, where: str, size_bytes: int, load_data: bool = True) -> dict[str, Any]:
    """Tensors by name. Plain values that an export put beside them come back under their names.

    Args:
        load_data: False: tensors are on the meta device.

    Raises:
        IntegrityError: kind ``file_malformed``.
    """
    from safetensors import SafetensorError, safe_open

    with open(path, "rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
    if not 2 <= header_bytes <= min(size_bytes - 8, _MAX_HEADER_BYTES):
        raise limits.malformed(where, f"its header claims {header_bytes} bytes, the file has {size_bytes}")
    try:
        with safe_open(path, "pt", device="cpu") as opened:
            names = list(opened.keys())
            metadata = dict(sorted((opened.metadata() or {}).items()))  # the library's order is random
            if load_data:
                # A copy each: what is mapped from the file would change with it, or end the process when it shrinks.
                state: dict[str, Any] = {name: opened.get_tensor(name).clone() for name in names}
            else:
                shapes = {name: opened.get_slice(name).get_shape() for name in names}
                state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError, OverflowError) as error:
        raise limits.malformed(where, f"no safetensors file, or damaged: {error!s:.200}") from error
    values = _own_values(metadata.get(_VALUES), where)
    others = {name: text for name, text in metadata.items() if not name.startswith(_OWN) and (name, text) != _TORCH}
    if METADATA in state or values.keys() & state.keys():
        raise limits.malformed(where, "a tensor and a plain value have one name")
    return {**state, **values, **({METADATA: others} if others else {})}


_TORCH = ("format", "pt")


def _own_values(text: str | None, where: str) -> dict[str, Any]:
    """Plain values of an export of ours."""
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise limits.malformed(where, f"{_VALUES}: no JSON: {error!s:.200}") from error
    plain = isinstance(found, dict) and all(
        value is None or isinstance(value, bool | int | float | str) for value in found.values()
    )
    if not plain:
        raise limits.malformed(where, f"{_VALUES}: expected plain values by name")
    return dict(found)


def write_safetensors(state: Any, path: Path, facts: dict[str, str]) -> dict[str, int]:
    """Write the tensors under dotted names to a new file at ``path``; plain values go into its metadata.

    Args:
        facts: more metadata.

    Returns:
        Kinds of values that the format has no place for and that were left out, and how many.

    Raises:
        UsageError: kind ``duplicate_name``: two tensors, or two values, of one dotted path.
    """
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, Any] = {}
    left_out: collections.Counter[str] = collections.Counter()
    others = _texts(state)
    if others:
        state = {key: value for key, value in state.items() if key != METADATA}
    _collect(state, "", tensors, plain, left_out)
    metadata = {**others, **facts, "format": "pt"}
    if plain:
        metadata[_VALUES] = json.dumps(plain, sort_keys=True)
    if METADATA in tensors:  # the library would write it, and nobody could read the file
        raise UsageError(f"a tensor is called {METADATA!r}, which safetensors keeps for itself", kind="duplicate_name")
    save_file(tensors, path, metadata)
    return dict(left_out)


def _texts(state: Any) -> dict[str, str]:
    """The texts that the file had that the state was imported from."""
    found = state.get(METADATA) if isinstance(state, dict) else None
    if not isinstance(found, dict) or not all(type(k) is str and type(v) is str for k, v in found.items()):
        return {}
    return found


def _collect(
    value: Any,
    path: str,
    tensors: dict[str, torch.Tensor],
    plain: dict[str, Any],
    left_out: collections.Counter[str],
) -> None:
    if isinstance(value, torch.Tensor):
        if path in tensors:
            raise UsageError(f"two tensors are called {path!r}; export with only=...", kind="duplicate_name")
        # safetensors stores no shared memory: each name gets bytes of its own.
        tensors[path or "tensor"] = value.detach().contiguous().clone()
    elif isinstance(value, dict):
        for key, item in value.items():
            _collect(item, f"{path}.{key}" if path else str(key), tensors, plain, left_out)
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            _collect(item, f"{path}.{number}" if path else str(number), tensors, plain, left_out)
    elif value is None or isinstance(value, bool | int | float | str):
        if path in plain:
            raise UsageError(f"two values are called {path!r}; export with only=...", kind="duplicate_name")
        plain[path or "value"] = value
    else:
        left_out[f"{type(value).__module__}.{type(value).__qualname__}: left out".removeprefix("builtins.")] += 1
