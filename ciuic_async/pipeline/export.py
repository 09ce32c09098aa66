"""Snapshots in other people's formats."""

from __future__ import annotations

import json
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch

from ciuic_async.errors import StoreError, UsageError


class Described(Protocol):
    """What is recorded about the origin of an export."""

    @property
    def id(self) -> str: ...

    @property
    def step(self) -> int | None: ...


def export(state: Any, path: Path, snapshot: Described) -> Path:
    """Write ``state``'s tensors to ``path``; its suffix chooses the format.

    Raises:
        UsageError: kind ``unknown_format`` or ``duplicate_name``.
        StoreError: the place refused the file.
    """
    if path.suffix != ".safetensors":
        raise UsageError(
            f"{path}: unknown export format {path.suffix!r}; use a name that ends in .safetensors",
            kind="unknown_format",
        )
    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, Any] = {}
    _collect(state, "", tensors, plain)
    metadata = {"ciuic.snapshot": snapshot.id, "ciuic.step": json.dumps(snapshot.step), "format": "pt"}
    if plain:
        metadata["ciuic.values"] = json.dumps(plain, sort_keys=True)
    _write_safetensors(tensors, path, metadata)
    return path


def _collect(value: Any, path: str, tensors: dict[str, torch.Tensor], plain: dict[str, Any]) -> None:
    if isinstance(value, torch.Tensor):
        if path in tensors:
            raise UsageError(f"two tensors are called {path!r}; export with only=...", kind="duplicate_name")
        # safetensors stores no shared memory: each name gets bytes of its own.
        tensors[path or "tensor"] = value.detach().contiguous().clone()
    elif isinstance(value, dict):
        for key, item in value.items():
            _collect(item, f"{path}.{key}" if path else str(key), tensors, plain)
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            _collect(item, f"{path}.{number}" if path else str(number), tensors, plain)
    elif value is None or isinstance(value, bool | int | float | str):
        plain[path or "value"] = value


def _write_safetensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """A temporary file beside the target, fsync, rename: the target appears whole or not at all."""
    from safetensors.torch import save_file

    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        save_file(tensors, temporary, metadata)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except Exception as error:
        with suppress(OSError):
            temporary.unlink()
        raise StoreError(f"{path}: cannot export: {error}", kind="export_failed", where=str(path)) from error
