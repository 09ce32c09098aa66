"""The trainer's side of the keeper: starts it, gives it the slots, and tells it when training ends in order."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from ciuic_async.errors import UsageError
from ciuic_async.events import logger
from ciuic_async.keeper import wire
from ciuic_async.keeper.rescue import Charge
from ciuic_async.options import KEEPER

LOG = "CIUIC_KEEPER_LOG"
"""Environment variable: a file that keepers append their messages to. They have no other voice."""

_PROGRAM = (
    # At once, since importing takes a while: signals are often sent to all processes of a job.
    "import os, signal, sys; "
    "[signal.signal(getattr(signal, f'SIG{name}'), signal.SIG_IGN) for name in 'INT HUP QUIT USR1 USR2 TERM'.split()]; "
    "sys.path += [folder for folder in sys.argv[1].split(os.pathsep) if folder not in sys.path]; "
    "from ciuic_async.keeper.process import main; main(*map(int, sys.argv[2:]))"
)


class Memory(Protocol):
    """What is held: a slot."""

    @property
    def descriptor(self) -> int: ...


def check_available(url: str) -> None:
    """Refuse a keeper where it could only pretend.

    Raises:
        UsageError: kind ``no_keeper``; says what is missing.
    """
    missing = None
    if url.startswith("memory:"):
        missing = "the chain lies in this process's memory, where another process cannot write"
    elif not hasattr(os, "pidfd_open") or not hasattr(os, "memfd_create"):
        missing = "it needs Linux 5.3 or newer"
    elif not sys.executable:
        missing = "this process does not know its Python interpreter (sys.executable is empty)"
    elif getattr(sys, "frozen", False):
        missing = f"{sys.executable} is a program of its own, and no Python interpreter"
    else:
        try:
            os.close(os.pidfd_open(os.getpid()))
        except OSError as error:
            missing = f"the system refuses pidfd_open: {error}"
    if missing is not None:
        raise UsageError(f"keeper=True: {missing}; leave it out", kind="no_keeper")


class Keeper:
    """One keeper process. It is started by ``start`` and dismissed by ``close``; in between it may be killed at will.

    Thread-safe. No method but ``start`` waits, and none raises an ``Exception``.

    Args:
        charge: what the keeper does in this process's place.
    """

    def __init__(self, charge: Charge) -> None:
        self._charge = charge
        self._mutex = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._link: socket.socket | None = None
        self._address: Path | None = None
        self._held: dict[int, Memory] = {}
        self._started_s = float("-inf")
        self._closed = False

    def hold(self, slot: Memory) -> None:
        """A slot was made; the keeper gets its descriptor, now or when it is started."""
        with self._mutex:
            self._held[id(slot)] = slot
            if self._link is not None:
                self._send({"hold": id(slot)}, [slot.descriptor])

    def let_go(self, slot: Memory) -> None:
        """A slot is about to be closed."""
        with self._mutex:
            if self._held.pop(id(slot), None) is not None and self._link is not None:
                self._send({"let_go": id(slot)})

    def start(self) -> None:
        """Start the keeper if none is there: at first, or when it was killed and not just before. Milliseconds."""
        with self._mutex:
            if self._closed or self._alive():
                return
            now_s = time.monotonic()
            if now_s - self._started_s < KEEPER.restart_pause_s:
                return
            again = self._started_s != float("-inf")
            self._started_s = now_s
            if again:
                logger.warning("the keeper ended (%s); it is started again", self._how_it_ended())
            try:
                self._start()
            except (OSError, ValueError, subprocess.SubprocessError) as error:
                logger.warning("no keeper: it cannot be started: %s; training and snapshots go on without it", error)
                self._drop_link()

    @property
    def pid(self) -> int | None:
        """Of the process, as long as it is known to run."""
        with self._mutex:
            return self._process.pid if self._process is not None and self._alive() else None

    def close(self) -> None:
        """Everything staged is durable, or given up: the keeper may go. Awaits its end for a moment. Idempotent."""
        with self._mutex:
            self._closed = True
            if self._link is not None:
                self._send({"bye": True})
            self._drop_link()
            process, self._process = self._process, None
        if process is not None:
            try:
                process.wait(KEEPER.exit_s)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._forget_address()

    def _alive(self) -> bool:
        """Whether the keeper still has its end of the link: it never says anything."""
        if self._link is None:
            return False
        try:
            if self._link.recv(1):
                return True
        except BlockingIOError:
            return True
        except OSError:
            pass
        self._drop_link()
        return False

    def _start(self) -> None:
        # The address is there from now on, so that whoever is restarted at once finds a keeper that is still starting.
        self._forget_address()
        self._address, listener = wire.listen(self._charge.origin, self._charge.url)
        ours, theirs = socket.socketpair(socket.AF_UNIX, wire.KIND)
        with listener, theirs:
            ours.setblocking(False)  # a keeper that is stopped must not stop training
            self._link = ours
            # The trainer may have found its packages in a way of its own, which the interpreter alone does not know.
            package = str(Path(__file__).resolve().parents[2])
            folders = os.pathsep.join([package, *(os.path.abspath(folder) for folder in sys.path if folder)])
            numbers = [os.getpid(), theirs.fileno(), listener.fileno()]
            with open(os.environ.get(LOG) or os.devnull, "ab") as messages:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-c", _PROGRAM, folders, *map(str, numbers)],
                    stdin=subprocess.DEVNULL,
                    stdout=messages,
                    stderr=messages,
                    pass_fds=numbers[1:],
                    start_new_session=True,  # a terminal's Ctrl-C, or a launcher's kill of the group, is not for it
                    cwd="/",
                )
        charge = self._charge
        self._send(
            {
                "address": str(self._address),
                "url": charge.url,
                "origin": charge.origin,
                "secret": charge.secret,
                "run": charge.run,
                "codec": charge.codec,
                "ordering": charge.ordering,
                "storage_options": charge.storage_options,
                "grace_s": KEEPER.grace_s,
            }
        )
        for number, slot in self._held.items():
            self._send({"hold": number}, [slot.descriptor])

    def _send(self, message: wire.Message, descriptors: Sequence[int] = ()) -> None:
        if self._link is None:
            return
        try:
            wire.send(self._link, message, descriptors)
        except OSError as error:  # killed, or stopped with a full link: noticed at the next save
            logger.debug("the keeper does not listen: %s", error)
            self._drop_link()

    def _forget_address(self) -> None:
        """Of a keeper that has ended: one that was killed could not do it itself."""
        address, self._address = self._address, None
        if address is not None:
            with suppress(OSError):
                address.unlink()

    def _drop_link(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.close()

    def _how_it_ended(self) -> str:
        if self._process is None:
            return "it never ran"
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(0.1)
        status = self._process.returncode
        if status is None:
            self._process.kill()
            self._process.wait()
            return "it did not listen any more, and was killed"
        return f"killed by signal {-status}" if status < 0 else f"exit status {status}"
