"""Programs in the styles of the first documents, killed with SIGKILL at random moments and run again until they end.

One process forks every life, so that torch is loaded once; each life runs the program's text as a program of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ciuic_async import SnapshotChain
from ciuic_async.compat import CiuicSnapshotChain
from tests.crash.faults import LONG

LIVES = 40 if LONG else 3

COMMON = """
import hashlib, json, os, torch
from ciuic_async.compat import CiuicSnapshotChain

class Loader:
    '''Batches whose order follows from the epoch alone.'''
    def __init__(self, data, size):
        self.data, self.size, self.epoch = data, size, 0
    def __iter__(self):
        order = torch.randperm(len(self.data), generator=torch.Generator().manual_seed(self.epoch))
        return (self.data[order[n : n + self.size]] for n in range(0, len(self.data), self.size))

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Dropout(0.2), torch.nn.Linear(16, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
loader = Loader(torch.arange(480.0).view(120, 4) / 480, 4)
epochs = 2

def train(x):
    optimizer.zero_grad()
    loss = model(x).pow(2).mean()
    loss.backward()
    optimizer.step()
    return loss

def say(what):
    os.write(1, f"{what}\\n".encode())

def digest():
    hasher = hashlib.sha256(torch.get_rng_state().numpy().tobytes())
    for tensor in model.state_dict().values():
        hasher.update(tensor.numpy().tobytes())
    for slots in optimizer.state_dict()["state"].values():
        for tensor in slots.values():
            hasher.update(tensor.numpy().tobytes())
    return hasher.hexdigest()
"""

WITH_OBJECTS = (
    COMMON
    + """
chain = CiuicSnapshotChain(model, optimizer, save_dir="chain", snapshot_interval=3)
start_epoch, start_batch = chain.load_latest_snapshot()
say(f"started {start_epoch} {start_batch}")
for epoch in range(start_epoch, epochs):
    loader.epoch = epoch
    for batch_idx, x in enumerate(loader):
        if chain.resumed and epoch == start_epoch and batch_idx <= start_batch:
            continue
        train(x)
        say(f"batch {epoch} {batch_idx}")
        if batch_idx % chain.snapshot_interval == 0:
            chain.save_snapshot(epoch, batch_idx)
say(f"done {digest()}")
"""
)

WITH_FILE = (
    COMMON
    + """
chain = CiuicSnapshotChain("config.json")
start_epoch, start_batch = 0, -1
snapshot = chain.get_latest_snapshot()
if snapshot:
    model.load_state_dict(chain.load_model_state(snapshot))
    optimizer.load_state_dict(chain.load_optimizer_state(snapshot))
    start_epoch, start_batch = snapshot["epoch"], snapshot["batch_idx"]
say(f"started {start_epoch} {start_batch}")
for epoch in range(start_epoch, epochs):
    loader.epoch = epoch
    for batch_idx, x in enumerate(loader):
        if epoch == start_epoch and batch_idx <= start_batch:
            continue
        loss = train(x)
        say(f"batch {epoch} {batch_idx}")
        if batch_idx % 3 == 0:
            chain.save_snapshot({
                "model_state": model.state_dict(),
                "optimizer_state": optimizer.state_dict(),
                "epoch": epoch,
                "batch_idx": batch_idx,
                "loss": loss.item(),
            })
say(f"done {digest()}")
"""
)

FORGE = """
import json, os, random, runpy, signal, sys, warnings
import torch
import ciuic_async.compat
torch.set_num_threads(1)
torch.optim.SGD([torch.zeros(1)])  # the first one loads half of torch
warnings.simplefilter("error")
draw = random.Random(int(sys.argv[1]))

def life(kind, folder, lines):
    '''Run a program in a folder of its own; what it said. It is killed after so many lines (None: never), but not
    before it has made something durable: so every life comes further than the one before.'''
    slots = f"{kind}/{folder}/chain/log/commit"
    before = count(slots)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.chdir(f"{kind}/{folder}")
        os.dup2(writing, 1)
        os.close(reading)
        runpy.run_path("program.py", run_name="__main__")
        sys.exit(0)
    os.close(writing)
    said = []
    with os.fdopen(reading) as lives:
        for line in lives:
            said.append(line.strip())
            if lines is not None and len(said) > lines and count(slots) > before:
                os.kill(pid, signal.SIGKILL)
                break
    return said, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def count(slots):
    return len(os.listdir(slots)) if os.path.isdir(slots) else 0

found = {}
for kind in ("objects", "file"):
    reference = life(kind, "whole", None)
    lives = [life(kind, "killed", draw.randrange(3, 20)) for _ in range(int(sys.argv[2]))]
    lives.append(life(kind, "killed", None))
    found[kind] = {"reference": reference, "lives": lives}
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.timeout(60 + 20 * LIVES)
def test_a_killed_program_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """In both styles, where the order of batches follows from the epoch: however often killed, the same bits at last.

    Every life starts at the last finished batch of a snapshot, no life before the one before it.
    """
    for kind, program in (("objects", WITH_OBJECTS), ("file", WITH_FILE)):
        for name in ("whole", "killed"):
            folder = tmp_path / kind / name
            folder.mkdir(parents=True)
            (folder / "program.py").write_text(program)
            (folder / "config.json").write_text(json.dumps({"storage_type": "local", "bucket_name": "chain"}))
    seed = int.from_bytes(os.urandom(4))
    done = subprocess.run(
        [sys.executable, "-c", FORGE, str(seed), str(LIVES)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=50 + 20 * LIVES,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), f"seed {seed}"
    for kind, found in json.loads(done.stdout).items():
        reference, lives = found["reference"], found["lives"]
        assert reference[1] == lives[-1][1] == 0, f"{kind}, seed {seed}"
        assert [code for _, code in lives[:2]] == [-9, -9], f"{kind}, seed {seed}"
        assert {code for _, code in lives} == {-9, 0}, f"{kind}, seed {seed}: a late life may end before it is killed"
        assert lives[-1][0][-1] == reference[0][-1], f"{kind}, seed {seed}"
        starts = [tuple(map(int, said[0].split()[1:])) for said, _ in lives]
        assert starts == sorted(starts), f"{kind}, seed {seed}"
        assert starts[-1] > starts[0], f"{kind}, seed {seed}: nothing was resumed"
        for folder in ("whole", "killed"):
            with SnapshotChain(tmp_path / kind / folder / "chain", create=False) as chain:
                latest = chain.latest()
                assert latest is not None
                assert (latest.epoch, latest.batch) == (1, 27), "the last one is durable though nobody called close()"


# --- what skipping batches means --------------------------------------------------------------------------------------


class Numbers(torch.utils.data.Dataset[int]):
    """Twenty numbers."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> int:
        return index


def epoch_with_a_stop(folder: Path, stop: int | None) -> tuple[list[int], tuple[Any, Any]]:
    """The documents' loop over a shuffling DataLoader, left after a snapshot of batch ``stop``: numbers trained on."""
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    seen = []
    with CiuicSnapshotChain(model, optimizer, save_dir=folder) as chain:
        start = chain.load_latest_snapshot()
        for batch_idx, batch in enumerate(torch.utils.data.DataLoader(Numbers(), batch_size=1, shuffle=True)):
            if chain.resumed and batch_idx <= start[1]:
                continue
            seen.append(int(batch))
            if batch_idx == stop:
                chain.save_snapshot(0, batch_idx)
                break
    return seen, start


def test_skipping_batches_of_a_shuffling_loader_is_not_exact(tmp_path: Path) -> None:
    """The order is drawn anew after a resume: some numbers come twice, some never, though random states came back."""
    torch.manual_seed(1)
    first, _ = epoch_with_a_stop(tmp_path / "s", stop=9)
    second, start = epoch_with_a_stop(tmp_path / "s", stop=None)
    assert start == (0, 9)
    assert len(first) + len(second) == 20, "as many batches as an epoch has"
    assert set(first) & set(second), "some were trained on twice"
    assert set(range(20)) - set(first) - set(second), "some were not trained on"


def test_a_loader_that_knows_its_place_is_exact(tmp_path: Path) -> None:
    """With the loader's own state in ``also`` a resumed epoch sees each number once, with no batch skipped by hand."""

    class Loader:
        def __init__(self) -> None:
            self.order: list[int] = []
            self.position = 0

        def __iter__(self) -> Any:
            self.order = self.order or torch.randperm(20).tolist()
            while self.position < 20:
                self.position += 1
                yield self.order[self.position - 1]

        def state_dict(self) -> dict[str, Any]:
            return {"order": self.order, "position": self.position}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.order, self.position = list(state["order"]), state["position"]

    seen = []
    for stop in (9, None):
        model, loader = torch.nn.Linear(1, 1), Loader()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with CiuicSnapshotChain(model, optimizer, save_dir=tmp_path / "s", also={"loader": loader}) as chain:
            chain.load_latest_snapshot()
            for number in loader:
                seen.append(number)
                if loader.position == stop:
                    chain.save_snapshot(0, stop)
                    break
    assert sorted(seen) == list(range(20))


@pytest.mark.parametrize(("form", "trained"), [("<=", [0, 1, 2, 3, 4, 5]), ("<", [0, 1, 2, 3, 3, 4, 5])])
def test_the_batch_that_comes_back_is_finished(form: str, trained: list[int], tmp_path: Path) -> None:
    """``<=`` goes on behind the last finished batch; ``<`` trains on it once more."""
    seen = []
    for stop in (3, None):
        model = torch.nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with CiuicSnapshotChain(model, optimizer, save_dir=tmp_path / "s") as chain:
            _, start = chain.load_latest_snapshot()
            for batch in range(6):
                if chain.resumed and (batch <= start if form == "<=" else batch < start):
                    continue
                seen.append(batch)
                if batch == stop:
                    chain.save_snapshot(0, batch)
                    break
    assert seen == trained
