"""The forge: imports once, then forks a child for each line on stdin, which is one experiment as JSON.

A child says on stdout ``durable STEP ID`` or ``failed STEP KIND MESSAGE`` for each snapshot, only after
``wait_durable``; ``calls NAMES`` for the counted calls of its faulty part; and the forge says ``end STATUS`` after it.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import traceback
import warnings
from typing import Any

import torch

from ciuic_async import Checkpointer, KeepLatest, native
from ciuic_async.chain import SnapshotChain
from ciuic_async.errors import CiuicError
from ciuic_async.stores import local
from ciuic_async.transparency import keys
from tests.crash.faults import KEPT, Fault, FaultyOs, state_at

COMMANDS = open(0, "rb", buffering=0, closefd=False)  # noqa: SIM115 -- unbuffered: a child reads its own lines

PR_SET_PTRACER = 0x59616D61
"""Yama's: lets a process that is no ancestor of a child attach strace to it, all of them with the argument -1."""


def say(*words: object) -> None:
    line = (" ".join(str(word).replace("\n", " ") for word in words) + "\n").encode()
    while True:
        try:
            os.write(1, line)
            return
        except OSError:  # the fault that strace planned hit this very line: it comes once
            continue


def take(checkpointer: Checkpointer, state: dict[str, Any], step: int) -> None:
    """Reach ``step``, take its snapshot, and say what became of it."""
    state.update(state_at(step))
    try:
        pending = checkpointer.step(metrics={"step": step})
        assert pending is not None
        say("durable", step, pending.wait_durable(60).id)
    except CiuicError as error:
        say("failed", step, error.kind, error)


def open_checkpointer(chain: str, state: dict[str, Any]) -> Checkpointer:
    return Checkpointer(chain, state, every_steps=1, keep=KeepLatest(KEPT), rng=False)


def save(request: dict[str, Any], faulty: FaultyOs) -> None:
    """Two more snapshots in a chain that has some, with retention, under the fault; then another without it."""
    state = state_at(0)
    checkpointer = open_checkpointer(request["chain"], state)
    progress = checkpointer.restore()
    first = progress.step + 1 if progress else 1
    begin(request, faulty)
    take(checkpointer, state, first)
    take(checkpointer, state, first + 1)
    checkpointer.close()
    finish(faulty)
    try:
        with open_checkpointer(request["chain"], state) as checkpointer:
            checkpointer.restore()
            checkpointer._step = first + 1  # the restored one is older when the last save failed
            take(checkpointer, state, first + 2)
    except CiuicError as error:
        say("failed", first + 2, error.kind, error)


def create(request: dict[str, Any], faulty: FaultyOs) -> None:
    """A chain's first snapshot with everything made on the way, its key included, under the fault; then a second."""
    state = state_at(0)
    begin(request, faulty)
    try:
        with open_checkpointer(request["chain"], state) as checkpointer:
            take(checkpointer, state, 1)
    except CiuicError as error:
        say("failed", 1, error.kind, error)
    finish(faulty)
    with open_checkpointer(request["chain"], state) as checkpointer:
        checkpointer._step = 1
        take(checkpointer, state, 2)


def prepare(request: dict[str, Any], faulty: FaultyOs) -> None:
    """A chain with as many snapshots as retention keeps, and no fault."""
    state = state_at(0)
    with open_checkpointer(request["chain"], state) as checkpointer:
        for step in range(1, KEPT + 1):
            take(checkpointer, state, step)


def train(request: dict[str, Any], faulty: FaultyOs) -> None:
    """A small real training that goes on from where the chain is, until it is killed or ``until`` is reached."""
    options = request["options"]
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(40, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(model.parameters())
    with Checkpointer(
        request["chain"],
        {"model": model, "optimizer": optimizer},
        every_steps=options["every_steps"],
        keep=KeepLatest(options["keep"]),
    ) as checkpointer:
        progress = checkpointer.restore()
        step = progress.step if progress else 0
        say("ready", os.getpid())
        say("restored", step)
        while step < options["until"]:
            loss = model(torch.randn(16, 40)).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            pending = checkpointer.step(metrics={"loss": loss.item()})
            if pending is not None:
                pending.add_done_callback(
                    lambda done: (
                        say("failed", done.step, done.error.kind, done.error)
                        if done.error
                        else say("durable", done.step, done.wait_durable().id)
                    )
                )


def begin(request: dict[str, Any], faulty: FaultyOs) -> None:
    """The faulty part begins: from here calls count, or strace is attached."""
    if request["traced"]:
        ctypes.CDLL(None).prctl(PR_SET_PTRACER, ctypes.c_ulong(-1), 0, 0, 0)
        say("ready", os.getpid())
        assert COMMANDS.readline() == b"go\n"
        return
    for module in (local, keys):
        module.os = faulty  # type: ignore[assignment]


def finish(faulty: FaultyOs) -> None:
    say("calls", ",".join(faulty.calls))
    faulty.disarm()


def child(request: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if not request["native"]:
        native.core = None
    fault = None if request["fault"] is None else Fault(**request["fault"])
    SCENARIOS[request["scenario"]](request, FaultyOs(fault))


SCENARIOS = {"save": save, "create": create, "prepare": prepare, "train": train}


def main() -> None:
    assert SnapshotChain is not None  # imported here, once, and not in every child
    while line := COMMANDS.readline():
        pid = os.fork()
        if pid == 0:
            try:
                child(json.loads(line))
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
            os._exit(0)
        say("end", os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    main()
