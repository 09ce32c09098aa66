"""A restarted trainer and the keepers that earlier ones left: waits for them, uses their memory, sends them home."""

from __future__ import annotations

import os
import signal
import socket
import struct
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from ciuic_async.errors import CiuicError
from ciuic_async.events import logger
from ciuic_async.format.manifest import Manifest
from ciuic_async.keeper import wire
from ciuic_async.keeper.held import HeldSlot
from ciuic_async.options import KEEPER

_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
_REPORT_S = 10.0
_LOOK_S = 1.0
_CONNECT_S = 10.0


class Offer:
    """What one keeper has: the memory of a dead trainer's newest snapshot. End it with ``dismiss`` or ``close``.

    Attributes:
        snapshot: id in the chain of what the memory holds; None when it did not become durable.
        step: its step.
        problem: why it did not.
    """

    def __init__(self, link: socket.socket, keeper: int, message: wire.Message, slot: HeldSlot | None) -> None:
        self._link = link
        self._keeper = keeper  # pidfd
        self._slot = slot
        self.snapshot: str | None = message.get("snapshot")
        self.step: int | None = message.get("step")
        self.problem: str | None = message.get("problem")

    def chunks(self, snapshot: str, manifest: Manifest) -> Mapping[bytes, memoryview]:
        """Chunks of a snapshot that lie in this memory; they are checked by whoever reads them."""
        if self._slot is None or snapshot != self.snapshot:
            return {}
        try:
            return self._slot.chunks(manifest)
        except CiuicError as error:
            logger.debug("the keeper's memory is of no use: %s", error)
            return {}

    def dismiss(self) -> None:
        """The keeper ends: it commits nothing any more when this returns. Idempotent."""
        if self._slot is not None:
            self._slot.forget()
            self._slot = None
        gone = None
        with suppress(OSError):
            wire.send(self._link, {"go": True})
            self._link.settimeout(KEEPER.exit_s)
            gone, _ = wire.receive(self._link)
        if gone is None:
            _end(self._keeper)
        self.close()

    def close(self) -> None:
        """Leave the keeper as it is, for another try. Idempotent."""
        self._slot = None
        self._link.close()
        keeper, self._keeper = self._keeper, -1
        if keeper >= 0:
            os.close(keeper)


def find(origin: str, url: str) -> list[Offer]:
    """Keepers whose trainers are dead; waits until they have done what they can. Those of living ones are left alone.

    A keeper that does not finish within ``KEEPER.wait_s`` is killed: from then on it cannot commit. So is one that
    shows no sign of life for ``KEEPER.silent_s``, unless its trainer lives.
    """
    return [offer for path in wire.addresses(origin, url) if (offer := _ask(path)) is not None]


def _ask(path: Path) -> Offer | None:
    link = socket.socket(socket.AF_UNIX, wire.KIND)
    descriptors: list[int] = []
    try:
        link.settimeout(_CONNECT_S)
        link.connect(str(path))
        if _peer(link)[1] != os.getuid():
            raise OSError(f"{path} is another user's")
        message, descriptors = _answer(link, path)
        if message is None or message.get("state") != "over" or not descriptors:
            raise OSError(f"{path} belongs to a trainer that lives, or its keeper is gone")
    except ConnectionRefusedError:  # it was killed, and its address stayed
        link.close()
        with suppress(OSError):
            path.unlink()
        return None
    except (OSError, AttributeError) as error:
        logger.debug("no keeper at %s: %s", path, error)
        wire.close_all(descriptors)
        link.close()
        return None
    # Not its number: that means another process to whoever is in another container.
    keeper, *rest = descriptors
    slot = None
    if rest:
        with suppress(CiuicError, OSError):
            slot = HeldSlot.open(rest[0])
        wire.close_all(rest)
    return Offer(link, keeper, message, slot)


def _peer(link: socket.socket) -> tuple[int, int]:
    """Process and user who last called ``listen`` on what the link leads to."""
    pid, uid, _ = _CREDENTIALS.unpack(link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return pid, uid


def _answer(link: socket.socket, path: Path) -> tuple[wire.Message | None, list[int]]:
    """What the keeper says when it has time; it is killed if it does not get there."""
    started_s = told_s = alive_s = time.monotonic()
    sign = _sign_of_life(path)
    link.settimeout(_LOOK_S)
    while True:
        with suppress(TimeoutError):
            answer = wire.receive(link)
            link.settimeout(None)
            return answer
        now_s = time.monotonic()
        if (newer := _sign_of_life(path)) != sign:
            sign, alive_s = newer, now_s
        if now_s - alive_s >= KEEPER.silent_s:
            logger.warning(
                "a keeper of this chain shows no sign of life for %.0f s (it is stopped, or the machine stands still): "
                "restoring from the chain alone, without what it holds",
                now_s - alive_s,
            )
            _end_listener(path, unless_trainer_lives=True)
            return None, []
        if now_s - started_s >= KEEPER.wait_s:
            logger.error("the crashed run's keeper did not finish within %.0f s and is killed", KEEPER.wait_s)
            _end_listener(path)
            return None, []
        if now_s - told_s >= _REPORT_S and alive_s > started_s:
            told_s = now_s
            logger.warning(
                "the crashed run's keeper is still writing its newest snapshot; waiting for it, %.0f s so far",
                now_s - started_s,
            )


def _sign_of_life(path: Path) -> int | None:
    """Something that changes every other second while a keeper is at work."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def _end_listener(path: Path, *, unless_trainer_lives: bool = False) -> None:
    """Kill the keeper that listens at an address."""
    with socket.socket(socket.AF_UNIX, wire.KIND) as again, suppress(OSError, IndexError):
        again.settimeout(1.0)
        again.connect(str(path))  # anew: when we connected first it may have been its trainer's address still
        pid = _peer(again)[0]
        keeper = os.pidfd_open(pid)
        try:
            # One that never came so far as to listen itself leaves its trainer's number there, by now anybody's.
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            if b"ciuic_async.keeper" in command and not (unless_trainer_lives and _has_its_trainer(pid, command)):
                _end(keeper)
        finally:
            os.close(keeper)


def _has_its_trainer(pid: int, command: bytes) -> bool:
    """Whether a keeper's parent is still the process that started it: nobody else is told its number."""
    trainer = command.rstrip(b"\0").split(b"\0")[-3]
    parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
    status = Path(f"/proc/{parent}/status").read_bytes()
    # Of a trainer in another container both its number here and there.
    return any(line.startswith(b"NSpid:") and trainer in line.split() for line in status.splitlines())


def _end(keeper: int) -> None:
    """Kill a process, and wait until it is gone; not for ever, since a disk that hangs holds what writes to it."""
    if keeper < 0:
        return
    with suppress(OSError):
        signal.pidfd_send_signal(keeper, signal.SIGKILL)
    if not wire.readable(keeper, KEEPER.exit_s):
        logger.error("the crashed run's keeper does not end: it may still add the snapshot that it had")
