"""Contenders from other packages. What is not installed, or does not run here, is left out, and its reason is kept."""

from __future__ import annotations

import importlib
import json
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from harness.contenders import (
    BUILT_IN,
    Entry,
    InBackground,
    NoSnapshots,
    State,
    fsync_folder,
    fsync_tree,
    state_dicts,
)
from harness.output import say


def flat_tensors(state: Any) -> dict[str, Tensor]:
    """Every tensor of a state by its path; of tensors that share memory the first, since safetensors takes no other."""
    leaves, _ = pytree.tree_flatten_with_path(state)
    found: dict[str, Tensor] = {}
    seen: set[tuple[int, torch.Size, tuple[int, ...]]] = set()
    for path, leaf in leaves:
        if isinstance(leaf, Tensor):
            place = (leaf.data_ptr(), leaf.shape, leaf.stride())
            if leaf.numel() and place in seen:
                continue
            seen.add(place)
            found[pytree.keystr(path)] = leaf.detach().contiguous()
    return found


class Safetensors(NoSnapshots):
    """``safetensors.torch.save_file``, then fsync and rename. It holds tensors only; the rest goes into its header."""

    def __init__(self, folder: Path, state: State) -> None:
        self._save = importlib.import_module("safetensors.torch").save_file
        self._folder = folder
        self._state = state

    def save(self) -> None:
        dictionaries = state_dicts(self._state)
        plain = pytree.tree_map(lambda leaf: None if isinstance(leaf, Tensor) else leaf, dictionaries)
        temporary = self._folder / "checkpoint.tmp"
        self._save(flat_tensors(dictionaries), temporary, metadata={"rest": json.dumps(plain, default=str)})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.rename(self._folder / "checkpoint.safetensors")
        fsync_folder(self._folder)


class TorchCheckpointing(InBackground):
    """Meta's ``torch_checkpointing``: staged into shared memory, written by a process of its own.

    Without direct I/O, which fails on ext4. It never fsyncs: a thread does so when the write is done. Its asynchronous
    staging needs a lock around ``optimizer.step()`` that training here does not take, so it stages before it returns.
    """

    def __init__(self, folder: Path, state: State) -> None:
        super().__init__(folder, state)
        manager = importlib.import_module("torch_checkpointing")
        config = importlib.import_module("torch_checkpointing.config")
        staging = importlib.import_module("torch_checkpointing.staging")
        storage = importlib.import_module("torch_checkpointing.storage.filesystem")
        self._manager = manager.CheckpointManager(
            manager.CheckpointManager.Config(
                save=config.AsyncCheckpointSaverConfig(
                    staging_config=staging.CheckpointStagerConfig(
                        use_pinned_memory=False, use_async_staging=False, use_non_blocking_copy=False
                    )
                ),
                storage_config=storage.LocalFileSystemStorageConfig(use_direct_io=False),
            )
        )
        self._thread = ThreadPoolExecutor(1)

    def start(self, number: int) -> Future[Any]:
        target = self._folder / str(number)
        writing = self._manager.save(str(target), state_dicts(self._state))

        def finish() -> None:
            writing.result()
            fsync_tree(target)

        return self._thread.submit(finish)

    def close(self) -> None:
        try:
            super().close()
        finally:
            self._manager.close()
            self._thread.shutdown()


class TorchSnapshot(InBackground):
    """``torchsnapshot.Snapshot.async_take``; it never fsyncs: a thread does so when the write is done."""

    def __init__(self, folder: Path, state: State) -> None:
        super().__init__(folder, state)
        self._snapshot = importlib.import_module("torchsnapshot").Snapshot
        self._thread = ThreadPoolExecutor(1)

    def start(self, number: int) -> Future[Any]:
        target = self._folder / str(number)
        pending = self._snapshot.async_take(str(target), dict(self._state))

        def finish() -> None:
            pending.wait()
            fsync_tree(target)

        return self._thread.submit(finish)

    def close(self) -> None:
        super().close()
        self._thread.shutdown()


class LightningAsync(InBackground):
    """Lightning's ``AsyncCheckpointIO`` around its ``TorchCheckpointIO``, to which an fsync is added."""

    def __init__(self, folder: Path, state: State) -> None:
        super().__init__(folder, state)
        plugins = importlib.import_module("pytorch_lightning.plugins.io")
        self._done: Future[Any] = Future()

        class Durable(plugins.TorchCheckpointIO):  # type: ignore[misc, name-defined]  # imported when it is there
            """Runs on the plugin's thread."""

            def save_checkpoint(inner, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:  # noqa: N805
                try:
                    super().save_checkpoint(checkpoint, path, storage_options)
                    fsync_tree(Path(path).parent)
                    self._done.set_result(None)
                except BaseException as error:
                    self._done.set_exception(error)

        self._plugin = plugins.AsyncCheckpointIO(Durable())

    def start(self, number: int) -> Future[Any]:
        self._done = Future()
        target = self._folder / "lightning"
        target.mkdir(exist_ok=True)
        self._plugin.save_checkpoint(state_dicts(self._state), str(target / "checkpoint.ckpt"))
        return self._done

    def close(self) -> None:
        super().close()
        self._plugin.teardown()


OTHERS: dict[str, Entry] = {
    "torch_checkpointing": Entry(TorchCheckpointing, "fsync added by the bench after its rename"),
    "torchsnapshot.async_take": Entry(TorchSnapshot, "fsync added by the bench after its last write"),
    "Lightning AsyncCheckpointIO": Entry(LightningAsync, "fsync added by the bench after its write", replaces=True),
    "safetensors + fsync": Entry(Safetensors, "temporary file, fsync, rename, fsync of the folder", replaces=True),
}
CONTENDERS = {**BUILT_IN, **OTHERS}


class Toy:
    """A state of a few bytes, for trying contenders out."""

    def __init__(self) -> None:
        self.weights = torch.arange(1024.0)

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights, "steps": 3}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.weights = state["weights"]


def runnable(names: Sequence[str], folder: Path) -> tuple[list[str], dict[str, str]]:
    """Those contenders that save a toy state here, and why the others do not.

    Raises:
        KeyError: no contender has that name.
    """
    good: list[str] = []
    missing: dict[str, str] = {}
    for name in names:
        entry = CONTENDERS[name]
        try:
            with tempfile.TemporaryDirectory(dir=folder) as place:
                contender = entry.make(Path(place), {"toy": Toy()})
                try:
                    contender.save()
                    contender.wait()
                finally:
                    contender.close()
        except Exception as error:
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            say(f"{name} does not run here: {missing[name]}")
        else:
            good.append(name)
    return good, missing


def quieten() -> None:
    """Opponents warn about their own deprecations and about running without a process group."""
    warnings.filterwarnings("ignore", module=r"(torch|torchsnapshot|pytorch_lightning|lightning_fabric)(\..*)?")
    warnings.filterwarnings("ignore", message=r".*(TypedStorage|pkg_resources).*")
