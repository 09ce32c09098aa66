"""The class of the first documents. Both of its ways are a few calls of ``Checkpointer`` and ``SnapshotChain``."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, overload

from ciuic_async.arguments import check_number
from ciuic_async.capture import training
from ciuic_async.chain import Snapshot, SnapshotChain
from ciuic_async.checkpointer import Checkpointer
from ciuic_async.compat.config import Config, load_config
from ciuic_async.compat.record import STATES, WHOLE, SnapshotRecord
from ciuic_async.config.settings import missing, reading_files
from ciuic_async.errors import IntegrityError, UsageError
from ciuic_async.events import logger
from ciuic_async.interchange import files, usual
from ciuic_async.oneoff import save
from ciuic_async.pending import PendingSnapshot

_FACTS = ("epoch", "batch_idx", "loss", "step", "metrics")
"""Items of a mapping to save that are no state."""
Reference = str | Snapshot | SnapshotRecord | Mapping[str, Any]


class _Steps:
    """Counts an optimizer's steps. Knows nothing of whoever asks."""

    def __init__(self) -> None:
        self.done = 0
        self._handle: Any = None

    def follow(self, optimizer: Any) -> bool:
        """Count from now on; False where the optimizer tells nobody of its steps."""
        register = getattr(optimizer, "register_step_post_hook", None)
        if register is None:
            return False

        def count(*_: Any) -> None:
            self.done += 1

        self._handle = register(count)
        return True

    def leave(self) -> None:
        """Take the hook away again."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


class _Running:
    """What must end with the interface, or with the program."""

    def __init__(self, chain: SnapshotChain, steps: _Steps) -> None:
        self.chain = chain
        self.steps = steps
        self.checkpointer: Checkpointer | None = None
        self._owner_pid = os.getpid()

    def end(self) -> None:
        """Make durable what was taken, then give everything back."""
        if os.getpid() != self._owner_pid:
            return  # a forked child: everything belongs to its parent
        try:
            self.steps.leave()
            if self.checkpointer is not None:
                self.checkpointer.close()
        finally:
            self.chain.close()


class CiuicSnapshotChain:
    """Snapshots of a training by the interface of the first documents (docs/compat.md), in one of two ways:

    ``CiuicSnapshotChain(model, optimizer, save_dir="snapshots", snapshot_interval=10)`` takes snapshots of these
    objects: ``save_snapshot(epoch, batch)`` and ``load_latest_snapshot() -> (epoch, batch)``.

    ``CiuicSnapshotChain("config.json")`` keeps state dicts that it is given, where the file says:
    ``save_snapshot({"model_state": ..., ...})`` and ``get_latest_snapshot()``.

    Either way ``save_snapshot`` returns when the state is copied, and the snapshot becomes durable behind; what is not
    yet so at the end of the program is finished then, closed or not. Failures in the background are warnings. For the
    training thread.

    Args:
        model, optimizer: whatever has ``state_dict()`` and ``load_state_dict()``.
        save_dir: path or URL of the chain.
        snapshot_interval: for the loop to ask (``if batch % chain.snapshot_interval == 0``); nothing here goes by it.
        also: more objects of the training by name: a scheduler, a stateful loader. With a loader that knows its place
            a resumed run is the very same; one that skips batches mostly is not.
        options: further options of ``Checkpointer``; what is not given comes from environment and ``ciuic.toml``.
        config_path: the JSON file; docs/compat.md lists its keys.

    Raises:
        UsageError: an argument, or a key of the file, is wrong.
    """

    @overload
    def __init__(
        self,
        model: Any,
        optimizer: Any,
        save_dir: str | os.PathLike[str] = "snapshots",
        snapshot_interval: int = 10,
        *,
        also: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None: ...
    @overload
    def __init__(self, config_path: str | os.PathLike[str], /) -> None: ...
    @overload
    def __init__(self, *, config_path: str | os.PathLike[str]) -> None: ...
    def __init__(
        self,
        model: Any = None,
        optimizer: Any = None,
        save_dir: str | os.PathLike[str] = "snapshots",
        snapshot_interval: int = 10,
        *,
        also: Mapping[str, Any] | None = None,
        config_path: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        if config_path is None and isinstance(model, str | os.PathLike):
            model, config_path = None, model
        if (config_path is None) == (model is None) or (model is None) != (optimizer is None):
            raise UsageError(
                "expected CiuicSnapshotChain(model, optimizer, save_dir=..., snapshot_interval=...), or "
                "CiuicSnapshotChain(config_path) with the path of a JSON file"
            )
        self._state: dict[str, Any] = {}
        self._steps = _Steps()
        self._counts_steps = False
        self._resumed = False
        if config_path is not None:
            if also is not None or options:
                raise UsageError("with a configuration file everything else stands in there")
            config = load_config(config_path)
            self._live = False
            said = {"codec": config.compression, "keep": config.retention}
            self._options: dict[str, Any] = {name: value for name, value in said.items() if value is not None}
            self._options["staging"] = "blocking"  # copied before save_snapshot returns, whoever owns the tensors
            with reading_files():  # this is a training, too: what is wrong for the engine shows now, not hours later
                missing("Checkpointer", self._options)
                chain = _open(config)
        else:
            config = Config(os.fspath(save_dir), interval=snapshot_interval)
            check_number("snapshot_interval", snapshot_interval, whole=True)
            self._live = True
            self._options = dict(options)
            self._state = {"model": model, "optimizer": optimizer, **(also or {})}
            for name in ("model", "optimizer"):
                if not training.is_stateful(self._state[name]):
                    kind = type(self._state[name]).__qualname__
                    raise UsageError(f"{name}: expected state_dict() and load_state_dict(), found a {kind}")
            with reading_files():
                chain = _open(config, key=self._options.pop("key", None))
            self._counts_steps = self._steps.follow(optimizer)
        self.snapshot_interval = config.interval
        self._config = config
        self._running = _Running(chain, self._steps)
        self._finalizer = weakref.finalize(self, self._running.end)
        if self._live:
            try:
                self._checkpointer()  # an option that is wrong is an error here, and not in the middle of training
            except BaseException:
                self._finalizer()
                raise

    # --- the training loop --------------------------------------------------------------------------------------------

    @overload
    def save_snapshot(self, epoch: Any, batch: Any, *, loss: Any = None) -> PendingSnapshot: ...
    @overload
    def save_snapshot(self, snapshot: Mapping[str, Any], /) -> PendingSnapshot: ...
    def save_snapshot(self, epoch: Any, batch: Any = None, *, loss: Any = None) -> PendingSnapshot:
        """Take a snapshot now. On return everything is copied and training may go on.

        Args:
            epoch, batch: where training stands; they come back verbatim. By convention ``batch`` is finished.
            snapshot: ``model_state``, ``optimizer_state``, ``epoch``, ``batch_idx``, ``loss``, and whatever else is
                state; ``step`` and ``metrics`` (numbers by name) are recorded as such.

        Returns:
            The snapshot on its way; ``wait_durable()`` waits for it.
        """
        if self._live:
            checkpointer = self._checkpointer()
            if not self._counts_steps:
                self._steps.done += 1
            metrics = None if loss is None else {"loss": loss}
            return checkpointer.save(metrics=metrics, step=self._steps.done, epoch=epoch, batch=batch)
        if not isinstance(epoch, Mapping) or batch is not None:
            raise UsageError(
                "save_snapshot: expected a mapping such as {'model_state': ..., 'optimizer_state': ..., 'epoch': 1, "
                "'batch_idx': 10, 'loss': 0.5}; save_snapshot(epoch, batch) is for CiuicSnapshotChain(model, optimizer)"
            )
        return self._save_mapping(epoch)

    def _save_mapping(self, given: Mapping[str, Any]) -> PendingSnapshot:
        state = _state_of(given)
        checkpointer = self._checkpointer()
        step = given.get("step")
        check_number("step", step, whole=True, zero=True)
        self._steps.done = self._steps.done + 1 if step is None else step
        self._state.clear()
        self._state.update(state)
        try:
            return checkpointer.save(
                metrics=_metrics_of(given),
                step=self._steps.done,
                epoch=given.get("epoch"),
                batch=given.get("batch_idx"),
            )
        finally:
            self._state.clear()  # what was given is the caller's: nothing of it is kept alive

    def load_latest_snapshot(self) -> tuple[Any, Any]:
        """Bring the newest good snapshot back into model and optimizer, and the random generators with it.

        Returns:
            ``(epoch, batch)`` verbatim as they were saved: the last *finished* batch. ``(0, 0)`` where there is no
            snapshot; ``resumed`` tells the two apart.

        Raises:
            TargetMismatchError: the snapshot does not fit; nothing was changed.
            IntegrityError: no snapshot is good, or the log is not the one that it was.
        """
        if not self._live:
            raise UsageError(
                "load_latest_snapshot() is for CiuicSnapshotChain(model, optimizer); with a configuration file: "
                "s = chain.get_latest_snapshot(), then chain.load_model_state(s) and chain.load_optimizer_state(s)"
            )
        progress = self._checkpointer().restore()
        self._resumed = progress is not None
        if progress is None:
            return 0, 0
        self._steps.done = progress.step
        return (0 if progress.epoch is None else progress.epoch), (0 if progress.batch is None else progress.batch)

    @property
    def resumed(self) -> bool:
        """Whether training goes on from a snapshot: what ``(0, 0)`` leaves open."""
        return self._resumed

    # --- state dicts --------------------------------------------------------------------------------------------------

    def get_latest_snapshot(self) -> SnapshotRecord | None:
        """The newest durable snapshot whose description is good, or None. Its tensors are read when asked for.

        Raises:
            IntegrityError: the log is not the one that it was, or no description is good.
        """
        failure: IntegrityError | None = None
        for snapshot in self.chain.newest_first():
            try:
                snapshot.resolve()
                return self._record(snapshot)
            except IntegrityError as error:
                failure = failure or error
                logger.warning("snapshot %s is damaged and was passed over: %s", snapshot.id, error)
        if failure is not None:
            raise failure
        return None

    def load_model_state(self, snapshot: Reference, model: Any = None) -> Any:
        """The model's state dict of a snapshot; with ``model`` it is loaded into that, too.

        The first state that is loaded before anything is saved makes training go on from its snapshot: the next one
        has it as parent, and the random generators are as they were.

        Args:
            snapshot: what ``get_latest_snapshot`` or ``query_snapshots`` gave, or a ref (``"latest"``, an id, a tag).

        Raises:
            NotFoundError: there is no such snapshot.
            UsageError: kind ``no_such_part``; it has no such state.
            IntegrityError: damage; names the tensor.
            TargetMismatchError: it does not fit ``model``.
        """
        return self._load("model_state", snapshot, model)

    def load_optimizer_state(self, snapshot: Reference, optimizer: Any = None) -> Any:
        """The same for the optimizer."""
        return self._load("optimizer_state", snapshot, optimizer)

    def _load(self, part: str, reference: Reference, target: Any) -> Any:
        if isinstance(reference, Mapping) and not isinstance(reference, SnapshotRecord):
            value = reference[part]  # a state that never was a snapshot
        else:
            record = self._find(reference)
            if part not in record:
                raise UsageError(f"snapshot {record.id} has no {part}; it has {list(record)}", kind="no_such_part")
            value = record[part]
            self._go_on_from(record)
        if target is not None:
            training.load_object(target, value, part, strict=True)
        return value

    def _go_on_from(self, record: SnapshotRecord) -> None:
        """The next snapshot comes from this one. Objects that a snapshot holds are none of ours, so none is changed."""
        if self._live or self._resumed or self._running.checkpointer is not None:
            return
        progress = self._checkpointer().restore(record.id, strict=False)
        self._resumed = True
        if progress is not None:
            self._steps.done = progress.step

    # --- any snapshot -------------------------------------------------------------------------------------------------

    def upload_snapshot(self, source: str | os.PathLike[str] | Mapping[str, Any]) -> SnapshotRecord:
        """Add a plain file (``.pt``, ``.safetensors``, ``.h5``), or a mapping as for ``save_snapshot``. Then durable.

        Raises:
            IntegrityError: the file is damaged, or asks for more than data.
        """
        if isinstance(source, Mapping):
            facts = usual.facts(dict(source), Path())
            state: Any = _state_of(source)
            metrics: Mapping[str, Any] = _metrics_of(source)
            config = None
        else:
            content = files.read(Path(source))
            facts, state = usual.facts(content.state, content.path), content.state
            metrics, config = facts.metrics, content.origin()
        self.flush()
        made = save(
            state,
            self.chain,
            metrics=metrics,
            step=facts.step,
            epoch=facts.epoch,
            batch=facts.batch,
            config=config,
            **{name: value for name, value in self._options.items() if name == "codec"},
        )
        return self._record(made)

    def download_snapshot(self, snapshot: Reference, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write a snapshot to a plain file, whose format its suffix says; see ``Snapshot.export``."""
        return self._find(snapshot).snapshot.export(path, overwrite=overwrite)

    def query_snapshots(
        self,
        *,
        epoch: int | None = None,
        min_step: int | None = None,
        max_step: int | None = None,
        tag: str | None = None,
        where: Callable[[SnapshotRecord], bool] | None = None,
        limit: int | None = None,
    ) -> list[SnapshotRecord]:
        """Snapshots that fit all that is given, oldest first. Reads the log alone.

        Args:
            where: asked last, e.g. ``lambda s: s["loss"] is not None and s["loss"] < 0.1``.
            limit: only so many, the newest.
        """
        check_number("limit", limit, whole=True)
        found = []
        for snapshot in self.chain:
            step = snapshot.step
            if epoch is not None and snapshot.epoch != epoch:
                continue
            if (min_step is not None and (step is None or step < min_step)) or (
                max_step is not None and (step is None or step > max_step)
            ):
                continue
            if tag is not None and tag not in snapshot.tags:
                continue
            record = self._record(snapshot)
            if where is None or where(record):
                found.append(record)
        return found if limit is None else found[-limit:]

    def rollback(self, snapshot: Reference, reason: str = "") -> SnapshotRecord:
        """Make a snapshot the latest, by an entry that says so; nothing is deleted. See ``SnapshotChain.rollback``.

        What training has in memory stays as it is: load the snapshot, or start again.
        """
        self.flush()
        return self._record(self.chain.rollback(self._find(snapshot).id, reason))

    def unsigned(self) -> list[SnapshotRecord]:
        """Snapshots that no quorum of witnesses has signed yet, oldest first; without witnesses all of them."""
        records = [self._record(snapshot) for snapshot in self.chain]
        return [record for record in records if not (record.witnessed().met and record.witnessed().have)]

    # --- ends ---------------------------------------------------------------------------------------------------------

    @property
    def chain(self) -> SnapshotChain:
        """The chain, with everything that it can."""
        return self._running.chain

    def flush(self, timeout_s: float | None = None) -> None:
        """Wait until everything taken so far is durable (or failed). Raises TimeoutError."""
        if self._running.checkpointer is not None:
            self._running.checkpointer.flush(timeout_s)

    def close(self) -> None:
        """Make durable what was taken, then end. Idempotent. The end of the program does the same."""
        self._finalizer()

    def __enter__(self) -> CiuicSnapshotChain:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"CiuicSnapshotChain({self.chain.url!r})"

    # --- helpers ------------------------------------------------------------------------------------------------------

    def _checkpointer(self) -> Checkpointer:
        """The engine; begun with the first use."""
        if not self._finalizer.alive:
            raise UsageError("this CiuicSnapshotChain is closed")
        if self._running.checkpointer is None:
            if not self._live:
                self._state["nothing yet"] = None  # the engine wants to know what it is for; each save says it anew
            self._running.checkpointer = Checkpointer(self.chain, self._state, **self._options)
            if not self._live:
                self._state.clear()
        return self._running.checkpointer

    def _record(self, snapshot: Snapshot) -> SnapshotRecord:
        return SnapshotRecord(self.chain, snapshot, self.chain.policy)

    def _find(self, reference: Reference) -> SnapshotRecord:
        if isinstance(reference, SnapshotRecord):
            return reference
        if isinstance(reference, Snapshot):
            return self._record(reference)
        if not isinstance(reference, str):
            raise UsageError(f"expected a snapshot or a ref such as 'latest', found a {type(reference).__qualname__}")
        return self._record(self.chain.get(reference))


def _open(config: Config, key: Any = None) -> SnapshotChain:
    options: dict[str, Any] = {"storage_options": config.storage_options} if config.storage_options else {}
    if config.trust is not None:  # None would be an answer: that nobody's word counts, whatever the environment says
        options["trust"] = config.trust
    return SnapshotChain(config.url, key=key, ordering=config.ordering, **options)


def _state_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping's state, by the names that a ``Checkpointer`` gives its parts."""
    state = {STATES.get(name, name): value for name, value in given.items() if name not in _FACTS}
    names = [name for name in given if name not in _FACTS]
    if not state or not all(isinstance(name, str) for name in names) or len(state) != len(names):
        raise UsageError(
            f"expected at least a model_state, under names that are texts and differ; found {names!r:.200}; "
            f"{WHOLE!r} is a good name for anything else"
        )
    return state


def _metrics_of(given: Mapping[str, Any]) -> dict[str, Any]:
    metrics = dict(given.get("metrics") or {})
    if given.get("loss") is not None:
        metrics["loss"] = given["loss"]
    return metrics
