"""Digests of what does not change: copied and digested once, then only referred to.

It is the user's word (``frozen=``) that it does not change; nothing here looks at the tensors again.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

from ciuic_async.handoffs import CapturePlan


class FrozenDigests:
    """The digests of frozen regions of the newest durable snapshot. Thread-safe.

    The training thread asks which regions need no copy; the writer learns them with every durable snapshot, and
    forgets them when one fails: then the next snapshot copies everything again.

    They hold for plans of the same structure alone (the plan cache gives those the same objects): values may stay as
    they are while strides, dtypes or the members of a pack change, and with them the bytes.
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._plan: CapturePlan | None = None
        self._known: dict[int, bytes] = {}

    def known(self, plan: CapturePlan) -> dict[int, bytes]:
        """Numbers of the plan's regions that need no copy, with their chunks' digests."""
        with self._mutex:
            old = self._plan
            if old is None or plan.tensors is not old.tensors or plan.forms is not old.forms:
                return {}
            return dict(self._known)

    def learn(self, plan: CapturePlan, digests: Sequence[bytes]) -> None:
        """A snapshot of this plan is durable."""
        fresh = {number: digests[number] for number, region in enumerate(plan.regions) if region.frozen}
        with self._mutex:
            self._plan, self._known = (plan, fresh) if fresh else (None, {})

    def forget(self) -> None:
        """Nothing is known any more: a snapshot failed, or another state is restored."""
        with self._mutex:
            self._plan, self._known = None, {}


Remembered = Mapping[int, bytes]
"""Regions of a snapshot that were not copied, with their digests."""
