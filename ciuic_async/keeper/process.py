"""The keeper: waits for the trainer's death, finishes what it had staged, and hands the memory to whoever restores.

One loop. While it rescues it answers nobody: who restores waits for it, and that is what they should do. A thread
beside it shows that it lives.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ciuic_async.keeper import wire
from ciuic_async.keeper.held import HeldSlot
from ciuic_async.keeper.rescue import Charge, Outcome, newest, rescue
from ciuic_async.options import KEEPER

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0


_LOOK_AGAIN_S = 1.0
_PULSE_S = 2.0
_PROBLEM_CHARS = 2000  # a packet has a limit
_DEAF_TO = (
    # A terminal's, whatever they mean to the trainer; and what batch systems send to all processes of a job.
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    # Often sent to all processes at once: there may be work to do.
    signal.SIGTERM,
)


class _Terminated(BaseException):
    """SIGTERM after the rescue: nobody is going to restart a trainer here. No Exception: no attempt may swallow it."""


def main(trainer_pid: int, link_descriptor: int, listener_descriptor: int) -> None:
    """Be the keeper of the trainer at the other end of a link. Returns when there is nothing more to do.

    Args:
        listener_descriptor: a socket that listens already.
    """
    for number in _DEAF_TO:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    link, listener = socket.socket(fileno=link_descriptor), socket.socket(fileno=listener_descriptor)
    listener.listen()  # again: from now on the address is this process's, for whoever asks the kernel
    link.setblocking(True)
    hello, _ = wire.receive(link)
    if hello is None:
        return
    keeper = _Keeper(trainer_pid, link, listener, hello)
    try:
        if keeper.watch():
            # A daemon: what it touches may hang, and no end waits for that.
            threading.Thread(target=keeper.show_life, name="ciuic-pulse", daemon=True).start()
            keeper.rescue()
            keeper.offer()
    except _Terminated:
        pass
    finally:
        keeper.close()


class _Keeper:
    def __init__(self, trainer_pid: int, link: socket.socket, listener: socket.socket, hello: wire.Message) -> None:
        self._link = link
        self._listener = listener
        self._address = Path(hello["address"])
        self._link_open = True
        self._charge = Charge(
            hello["url"],
            hello["origin"],
            hello["secret"],
            hello["run"],
            hello["codec"],
            hello["ordering"],
            hello.get("storage_options"),
        )
        self._grace_s = float(hello["grace_s"])
        self._slots: dict[int, int] = {}  # number of a slot -> descriptor
        self._dismissed = False  # the trainer ended in order
        self._outcome = Outcome()
        self._tried: list[str] = []
        self._died_s = 0.0
        self._trainer_pid = trainer_pid
        self._trainer: int | None = None
        with suppress(ProcessLookupError):
            self._trainer = os.pidfd_open(trainer_pid)
        if os.getppid() != trainer_pid and self._trainer is not None:  # it died before, and the number may be another's
            os.close(self._trainer)
            self._trainer = None
        link.setblocking(False)

    def watch(self) -> bool:
        """Until the trainer ends. True if it died and left something."""
        poll = select.poll()
        poll.register(self._link, select.POLLIN)
        if self._trainer is not None:
            poll.register(self._trainer, select.POLLIN)
        poll.register(self._listener, select.POLLIN)
        died = self._trainer is None
        while not died:
            # Without a link there is a trainer that became another program, perhaps, which no pidfd tells.
            ready = {descriptor for descriptor, _ in poll.poll(None if self._link_open else 1000 * _LOOK_AGAIN_S)}
            died = self._trainer in ready
            if self._link.fileno() in ready and not self._take_messages():
                poll.unregister(self._link)
            if self._dismissed:
                return False
            died = died or (not self._link_open and self._trainer_gave_up_all())
            if self._listener.fileno() in ready and not died:
                self._answer({"state": "watching"})
        self._take_messages()
        self._died_s = time.monotonic()
        return not self._dismissed and bool(self._slots)

    def _take_messages(self) -> bool:
        """Everything that is there; False when no more will come."""
        while self._link_open:
            try:
                message, descriptors = wire.receive(self._link)
            except BlockingIOError:
                return True
            except OSError:
                message, descriptors = None, []
            if message is None:
                self._link_open = False
            elif "hold" in message and descriptors:
                (self._slots[message["hold"]],) = descriptors
            elif "let_go" in message:
                descriptor = self._slots.pop(message["let_go"], None)
                if descriptor is not None:
                    os.close(descriptor)
            elif "bye" in message:
                self._dismissed = True
        return False

    def _trainer_gave_up_all(self) -> bool:
        """Whether the trainer lives and has none of the memory any more: it called ``exec``, its threads are gone."""
        held = {(found.st_dev, found.st_ino) for found in map(os.fstat, self._slots.values())}
        folder = f"/proc/{self._trainer_pid}/fd"
        try:
            for name in os.listdir(folder):
                with suppress(FileNotFoundError):  # closed meanwhile
                    found = os.stat(f"{folder}/{name}")
                    if (found.st_dev, found.st_ino) in held:
                        return False
        except OSError:  # nobody knows
            return False
        return True

    # --- the trainer is dead ----------------------------------------------------------------------------------------

    def rescue(self) -> None:
        """Make its newest staged snapshot durable; not durable yet is not the end, see ``offer``."""
        held: dict[int, HeldSlot] = {}
        for number, descriptor in self._slots.items():
            with suppress(Exception):  # a slot that cannot be read leaves the other one
                slot = HeldSlot.open(descriptor)
                if slot is not None:
                    held[number] = slot
        chosen = newest(held.values())
        for number in list(self._slots):
            if chosen is None or held.get(number) is not chosen:
                held.pop(number, None)
                os.close(self._slots.pop(number))
        del held
        self._attempt(chosen)

    def _attempt(self, slot: HeldSlot | None) -> None:
        """Try once. On a disk that hangs the kernel ends this process: nobody else here could."""
        signal.setitimer(signal.ITIMER_REAL, KEEPER.attempt_s)
        self._outcome = rescue(self._charge, slot, self._tried)
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        _log(self._outcome)

    def show_life(self) -> None:
        """Touch the address again and again: who waits at it sees that this process is neither stopped nor stuck."""
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # what comes here would reach the loop all the same
        while True:
            with suppress(OSError):
                os.utime(self._address)
            time.sleep(_PULSE_S)

    def offer(self) -> None:
        """Give the memory to a restarted trainer, and try again what failed, until the grace time is over."""
        signal.signal(signal.SIGTERM, _terminate)
        if self._outcome.slot is None:
            return
        pause_s, tried_s = _FIRST_PAUSE_S, time.monotonic()
        while True:
            now_s = time.monotonic()
            ends_s = self._died_s + self._grace_s
            next_s = ends_s if self._outcome.final else min(ends_s, tried_s + pause_s)
            if now_s >= ends_s:
                return
            if now_s >= next_s:
                # A commit is not broken off. Whoever said SIGTERM meanwhile is heard afterwards.
                signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
                self._attempt(self._outcome.slot)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
                pause_s, tried_s = min(2 * pause_s, _LONGEST_PAUSE_S), time.monotonic()
                continue
            if wire.readable(self._listener.fileno(), next_s - now_s) and self._hand_over():
                return

    def _hand_over(self) -> bool:
        """Answer a restarted trainer; True when it needs nothing any more."""
        outcome = self._outcome
        problem = outcome.problem and outcome.problem[:_PROBLEM_CHARS]
        myself = os.pidfd_open(os.getpid())
        try:
            return self._answer(
                {"state": "over", "snapshot": outcome.snapshot, "step": outcome.step, "problem": problem},
                [myself, *self._slots.values()],
            )
        finally:
            os.close(myself)

    def _answer(self, message: wire.Message, descriptors: Sequence[int] = ()) -> bool:
        """Say something to who connects, and wait for what it says, unless that was "watching": True for "go"."""
        with suppress(OSError):
            peer, _ = self._listener.accept()
            with peer:
                peer.setblocking(True)
                wire.send(peer, message, descriptors)
                if message["state"] == "watching":
                    return False
                reply, _ = wire.receive(peer)  # it restores meanwhile: as long as that takes
                if reply is None or "go" not in reply:
                    return False
                # Nothing is committed any more. Who restores need not wait until the kernel has freed the memory.
                wire.send(peer, {"state": "gone"})
                return True
        return False

    def close(self) -> None:
        with suppress(OSError):
            self._address.unlink()
        self._listener.close()


def _terminate(number: int, frame: object) -> None:
    raise _Terminated


def _log(outcome: Outcome) -> None:
    what = outcome.problem or (f"durable as {outcome.snapshot}" if outcome.snapshot else "nothing was staged")
    with suppress(OSError):  # on the disk that is full, perhaps
        print(f"keeper: the trainer died; step {outcome.step}: {what}", file=sys.stderr, flush=True)
