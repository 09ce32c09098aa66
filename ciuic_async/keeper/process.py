"""The keeper: waits for the trainer's death, finishes what it had staged, and hands the memory to whoever restores.

One thread, one loop. While it rescues it answers nobody: who restores waits for it, and that is what they should do.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

from ciuic_async.keeper import wire
from ciuic_async.keeper.held import HeldSlot
from ciuic_async.keeper.rescue import Charge, Outcome, newest, rescue

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0


class _Terminated(Exception):  # noqa: N818 (no error: somebody wants the machine back)
    """SIGTERM after the rescue: nobody is going to restart a trainer here."""


def main(trainer_pid: int, link_descriptor: int, listener_descriptor: int) -> None:
    """Be the keeper of the trainer at the other end of a link. Returns when there is nothing more to do.

    Args:
        listener_descriptor: a socket that listens already.
    """
    for number in (signal.SIGINT, signal.SIGHUP):  # a terminal's; the trainer decides what they mean
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # often sent to all processes at once: there may be work to do
    link, listener = socket.socket(fileno=link_descriptor), socket.socket(fileno=listener_descriptor)
    listener.listen()  # again: from now on the address is this process's, for whoever asks the kernel
    link.setblocking(True)
    hello, _ = wire.receive(link)
    if hello is None:
        return
    keeper = _Keeper(trainer_pid, link, listener, hello)
    try:
        if keeper.watch():
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
        self._charge = Charge(hello["url"], hello["secret"], hello["run"], hello["codec"])
        self._grace_s = float(hello["grace_s"])
        self._slots: dict[int, int] = {}  # number of a slot -> descriptor
        self._dismissed = False  # the trainer ended in order
        self._outcome = Outcome()
        self._died_s = 0.0
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
            ready = {descriptor for descriptor, _ in poll.poll()}
            died = self._trainer in ready
            if self._link.fileno() in ready and not self._take_messages():
                poll.unregister(self._link)  # a trainer that exec'ed, perhaps; its death is told by the pidfd alone
            if self._dismissed:
                return False
            if self._listener.fileno() in ready and not died:
                self._answer({"state": "watching"})
        self._take_messages()
        self._died_s = time.monotonic()
        return not self._dismissed and bool(self._slots)

    def _take_messages(self) -> bool:
        """Everything that is there; False when no more will come."""
        while self._link_open:
            try:
                message, descriptor = wire.receive(self._link)
            except BlockingIOError:
                return True
            except OSError:
                message, descriptor = None, None
            if message is None:
                self._link_open = False
            elif "hold" in message and descriptor is not None:
                self._slots[message["hold"]] = descriptor
            elif "let_go" in message:
                descriptor = self._slots.pop(message["let_go"], None)
                if descriptor is not None:
                    os.close(descriptor)
            elif "bye" in message:
                self._dismissed = True
        return False

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
        self._outcome = rescue(self._charge, chosen)
        _log(self._outcome)

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
                self._outcome = rescue(self._charge, self._outcome.slot)
                _log(self._outcome)
                pause_s, tried_s = min(2 * pause_s, _LONGEST_PAUSE_S), time.monotonic()
                continue
            if select.select([self._listener], [], [], next_s - now_s)[0] and self._hand_over():
                return

    def _hand_over(self) -> bool:
        """Answer a restarted trainer; True when it needs nothing any more."""
        outcome = self._outcome
        return self._answer(
            {"state": "over", "snapshot": outcome.snapshot, "step": outcome.step, "problem": outcome.problem},
            next(iter(self._slots.values()), None),
        )

    def _answer(self, message: wire.Message, descriptor: int | None = None) -> bool:
        """Say something to who connects, and wait for what it says, if it got a descriptor: True for "go"."""
        message = {**message, "pid": os.getpid()}
        with suppress(OSError):
            peer, _ = self._listener.accept()
            with peer:
                peer.setblocking(True)
                wire.send(peer, message, descriptor)
                if message["state"] == "watching":
                    return False
                reply, _ = wire.receive(peer)  # it restores meanwhile: as long as that takes
                return reply is not None and "go" in reply
        return False

    def close(self) -> None:
        with suppress(OSError):
            self._address.unlink()
        self._listener.close()


def _terminate(number: int, frame: object) -> None:
    raise _Terminated


def _log(outcome: Outcome) -> None:
    what = outcome.problem or (f"durable as {outcome.snapshot}" if outcome.snapshot else "nothing was staged")
    print(f"keeper: the trainer died; step {outcome.step}: {what}", file=sys.stderr, flush=True)
