"""What contradicts a chain is kept in the user's state folder, where the mirror's keeper cannot reach it."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from hashlib import sha256

from ciuic_async.errors import CiuicError
from ciuic_async.stores.base import Store
from ciuic_async.transparency import slots
from ciuic_async.user_folders import evidence_folder

KEPT = 16
"""Files of evidence for one chain; then no more are written, for a training that is started again and again."""


def keep(store: Store, origin: str, name: str) -> str | None:
    """Keep one small file of a store as evidence; where, or None. Never raises; equal bytes are kept once."""
    place = evidence_folder()
    if place is None:
        return None
    stem = f"mirror-{sha256(origin.encode()).hexdigest()[:32]}"
    with suppress(CiuicError, OSError):
        data = store.read(name, slots.LIMIT_BYTES)
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        known = sorted(place.glob(f"{stem}.*.evidence"))
        for path in known:
            if path.stat().st_size == len(data) and path.read_bytes() == data:
                return str(path)
        if len(known) < KEPT:
            path = place / f"{stem}.{time.time_ns()}.evidence"
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(descriptor)
            return str(path)
    return None
