"""The regret pill: bring a snapshot back into live objects, the newest good one unless told otherwise."""

from __future__ import annotations

import time
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ciuic_async.capture import training
from ciuic_async.capture.state_tree import decode_plain
from ciuic_async.chain import Snapshot, SnapshotChain
from ciuic_async.errors import CiuicError, IntegrityError, StoreError
from ciuic_async.events import Listener, logger
from ciuic_async.keeper import offer
from ciuic_async.keeper.offer import Offer
from ciuic_async.pipeline.bases import Parent
from ciuic_async.pipeline.restore import restore_objects
from ciuic_async.pipeline.spoilt import read_again
from ciuic_async.stores.fallback import out_of_reach


@dataclass(frozen=True, slots=True)
class Progress:
    """Where training stands after a restore.

    Attributes:
        step: steps done; counting goes on from here.
        epoch, batch: verbatim what was given to ``step``; by convention the last finished batch.
        metrics: recorded numbers by name.
        snapshot: what was restored.
        skipped: newer snapshots passed over because they are damaged: (id, reason).
        mismatches: differences that ``strict=False`` let pass.
    """

    step: int
    epoch: Any
    batch: Any
    metrics: dict[str, float]
    snapshot: Snapshot
    skipped: tuple[tuple[str, str], ...] = ()
    mismatches: tuple[str, ...] = ()


class Resumer:
    """Restores snapshots of one chain into the objects of one training.

    Args:
        chain: where they are.
        state: the live objects, by name.
        rng: also the random generators of python, numpy and torch.
        listener: hears of progress.
        warn: hears, in a sentence, of what the user should know and what stops nothing.
    """

    def __init__(
        self,
        chain: SnapshotChain,
        state: MutableMapping[str, Any],
        rng: bool,
        listener: Listener | None,
        warn: Callable[[str], None],
    ) -> None:
        self._chain, self._state, self._rng, self._listener, self._warn = chain, state, rng, listener, warn

    def resume(self, ref: str, strict: bool) -> tuple[Progress, Parent] | None:
        """See ``Checkpointer.restore``. None if there is no snapshot; ``Parent`` is what the next one follows."""
        offers = offer.find(self._chain.origin, self._chain.store.url)
        try:
            resumed = self._good(ref, strict, offers)
        except BaseException:
            for one in offers:
                one.close()
            raise
        for one in offers:  # from here on their keepers commit nothing any more
            one.dismiss()
        return resumed

    def _good(self, ref: str, strict: bool, offers: Sequence[Offer]) -> tuple[Progress, Parent] | None:
        for one in offers:
            if one.snapshot is None:
                self._warn(
                    f"the crashed run had staged step {one.step}, and that did not become durable: {one.problem}"
                )
        if ref != "latest":
            return self._restored(self._chain.get(ref), strict, (), offers)
        skipped: list[tuple[str, str]] = []
        failure: CiuicError | None = None
        for snapshot in self._chain.newest_first():
            try:
                return self._restored(snapshot, strict, tuple(skipped), offers)
            except (IntegrityError, StoreError) as error:
                # No permission, too many files, a mirror that does not answer and alone has what is missing here: the
                # newest state is not lost, only out of reach.
                cause = out_of_reach(error)
                if cause is error:
                    raise
                if cause is not None:
                    raise StoreError(
                        f"{error}. It is not known to be lost: try again when that place answers, or name an older "
                        "snapshot",
                        kind=cause.kind,
                        where=cause.where,
                    ) from error
                failure = failure or error
                skipped.append((snapshot.id, str(error)))
                self._warn(f"snapshot {snapshot.id} (step {snapshot.step}) is damaged and was passed over: {error}")
        if failure is None:
            return None
        raise IntegrityError(
            f"{self._chain.url}: none of {len(skipped)} snapshots is good; newest: {failure}. "
            "Run 'ciuic verify' on the chain; the objects may hold a mixture and must not be used",
            kind=failure.kind,
            where=failure.where,
        ) from failure

    def _restored(
        self, snapshot: Snapshot, strict: bool, skipped: tuple[tuple[str, str], ...], offers: Sequence[Offer]
    ) -> tuple[Progress, Parent]:
        return read_again(
            self._chain.store,
            f"snapshot {snapshot.id}",
            lambda: self._restored_once(snapshot, strict, skipped, offers),
        )

    def _restored_once(
        self, snapshot: Snapshot, strict: bool, skipped: tuple[tuple[str, str], ...], offers: Sequence[Offer]
    ) -> tuple[Progress, Parent]:
        started = time.perf_counter()
        resolved = snapshot.resolve()
        for one in offers:
            resolved = replace(resolved, in_memory={**resolved.in_memory, **one.chunks(snapshot.id, resolved.manifest)})
        result = restore_objects(
            self._chain.store, resolved, self._state, strict=strict, rng=self._rng, listener=self._listener
        )
        nodes = resolved.manifest.progress
        step, epoch, batch = decode_plain(nodes.step), decode_plain(nodes.epoch), decode_plain(nodes.batch)
        parent = Parent(snapshot.id, snapshot.leaf_hash, resolved.locator.chunks, since=self._chain.log_size)
        differences = training.environment_differences(resolved.manifest.environment, training.environment())
        if differences:
            self._warn(
                f"snapshot {snapshot.id} was taken in another environment, so training may not go on bit for bit: "
                + "; ".join(differences)
            )
        logger.info("restored snapshot %s, step %s, in %.2f s", snapshot.id, step, time.perf_counter() - started)
        done = step if isinstance(step, int) else 0
        return Progress(done, epoch, batch, snapshot.metrics, snapshot, skipped, result.mismatches), parent
