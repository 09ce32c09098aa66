"""Digests of what does not change: copied and digested once, then only referred to.

It is the user's word (``frozen=``) that it does not change; nothing here looks at the tensors again.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

from ciuic_async.format.manifest import Path
from ciuic_async.handoffs import CapturePlan, Region


class FrozenDigests:
    """The digests of frozen regions of the newest durable snapshot. Thread-safe.

    The training thread asks which regions need no copy; the writer learns them with every durable snapshot, and
    forgets them when one fails: then the next snapshot copies everything again.
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._known: dict[tuple[Path, int, int], bytes] = {}

    def known(self, plan: CapturePlan) -> dict[int, bytes]:
        """Numbers of the plan's regions that need no copy, with their chunks' digests."""
        with self._mutex:
            if not self._known:
                return {}
            found = ((number, self._known.get(_key(region))) for number, region in enumerate(plan.regions))
            return {number: digests for number, digests in found if digests is not None and plan.regions[number].frozen}

    def learn(self, plan: CapturePlan, digests: Sequence[bytes]) -> None:
        """A snapshot of this plan is durable."""
        fresh = {_key(region): digests[number] for number, region in enumerate(plan.regions) if region.frozen}
        with self._mutex:
            self._known = fresh

    def forget(self) -> None:
        """Nothing is known any more: a snapshot failed, or another state was restored."""
        with self._mutex:
            self._known = {}


def _key(region: Region) -> tuple[Path, int, int]:
    return region.path, region.size_bytes, region.item_size_bytes


Remembered = Mapping[int, bytes]
"""Regions of a snapshot that were not copied, with their digests."""
