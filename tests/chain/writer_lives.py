"""Writers that are born, write to one chain and are killed (``test_writers.py``). One process imports all, and forks.

It takes JSON lines: ``{"start": {...}}`` begins a writer, ``{"kill": PID}`` ends one by SIGKILL and waits for its end.
Everybody says on the one standard output, each line at once and whole: ``started PID``, ``ended PID STATUS``, and of
the writers ``ack WRITER INDEX NAME`` as soon as they know that an entry is durable.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

import torch

from ciuic_async import Checkpointer, SnapshotChain
from ciuic_async.format.entry import NoteEntry


def say(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def remark(chain_path: str, writer: str, life: int, key: str) -> None:
    """Adds notes, one after the other; each has a text that no other has."""
    with SnapshotChain(chain_path, key=key) as chain:
        target = chain.target()
        for turn in range(1_000_000):
            text = f"{writer}-{life}-{turn}"
            data = NoteEntry(chain.common(), text).encode()
            index = target.log.append(lambda _, data=data: [data], target.key, announce=target.announce)  # type: ignore[misc]
            say("ack", writer, index, text)


def train(chain_path: str, writer: str, life: int, key: str) -> None:
    """Takes snapshots of a small state; each is acknowledged by its id."""
    weight = torch.zeros(1000)
    with Checkpointer(chain_path, {"w": weight}, rng=False, key=key) as checkpointer:
        for turn in range(1_000_000):
            weight.fill_(1000 * life + turn)
            snapshot = checkpointer.save().wait_durable(60)
            say("ack", writer, snapshot.index, snapshot.id)


SCENARIOS = {"remark": remark, "train": train}


def start(scenario: str, **given: Any) -> None:
    pid = os.fork()
    if pid:
        say("started", pid)
        return
    try:
        SCENARIOS[scenario](**given)
    finally:
        sys.stderr.flush()
        os._exit(1)  # a writer ends by a signal; whatever it raised is on stderr


def main() -> None:
    while line := sys.stdin.readline():
        request = json.loads(line)
        if "start" in request:
            start(**request["start"])
        else:
            os.kill(request["kill"], signal.SIGKILL)
            _, status = os.waitpid(request["kill"], 0)
            say("ended", request["kill"], status)


if __name__ == "__main__":
    main()
