"""Rank and world size of this process. More than one rank is refused for now."""

from __future__ import annotations

import os
import sys

from ciuic_async.errors import UsageError


def require_single_rank() -> None:
    """Refuse a job of several ranks: this version would store one rank's state only.

    Raises:
        UsageError: kind ``several_ranks``.
    """
    world = _world_size()
    if world > 1:
        raise UsageError(
            f"this job has {world} ranks; this version stores the state of single-rank jobs only",
            kind="several_ranks",
        )


def _world_size() -> int:
    distributed = sys.modules.get("torch.distributed")  # never imported for this question alone
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return int(distributed.get_world_size())
    try:
        return int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError:
        return 1
