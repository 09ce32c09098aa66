"""Everything that reads foreign bytes, with the seeds of ``corpus`` and thousands of changes to them; without atheris.

``make fuzz`` looks longer, and follows coverage.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fuzz.mutations import mutations
from tests.fuzz.targets import TARGETS, accepts

CORPUS = Path(__file__).parent / "corpus"
ROOT = Path(__file__).parents[2]
CORPUS_LIMIT_BYTES = 200_000
INPUT_LIMIT_S = 5.0
MEMORY_LIMIT_BYTES = 256 << 20
MUTATIONS = 3000
"""For each target, over all of its seeds; fewer where an input takes long."""
FEWER = {"encoders": 600, "segment": 1000}


def seeds(target: str) -> dict[str, bytes]:
    """A target's files, by name."""
    return {path.name: path.read_bytes() for path in sorted((CORPUS / target).iterdir())}


def tried(target: str, inputs: list[bytes]) -> int:
    """How many inputs a target accepts; the worst of them stays within the bounds of time and memory."""
    before = _memory("VmRSS")
    _forget_peak()
    accepted = 0
    slowest_s = 0.0
    for data in inputs:
        begin = time.thread_time()
        accepted += accepts(target, data)
        slowest_s = max(slowest_s, time.thread_time() - begin)
    assert slowest_s < INPUT_LIMIT_S
    assert _memory("VmHWM") - before < MEMORY_LIMIT_BYTES
    return accepted


def _forget_peak() -> None:
    """From here on ``VmHWM`` is the most memory of what follows (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def _memory(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise AssertionError(f"/proc/self/status has no {name}")


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_seeds_are_read(target: str) -> None:
    """What real objects look like is accepted and written again as it was, so that changes to it reach far."""
    files = {name: data for name, data in seeds(target).items() if not name.startswith("found-")}
    assert 4 <= len(files) <= 25
    assert tried(target, list(files.values())) >= len(files) - 2  # some are of a later version


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_changed_bytes_are_refused_or_right(target: str) -> None:
    """Any change to a seed ends in a ``CiuicError`` or in what is written again the same, soon, in little memory."""
    files = seeds(target)
    every = list(files.values())
    count = FEWER.get(target, MUTATIONS) // len(files)
    changed = [data for name, seed in files.items() for data in mutations(seed, every, count, f"{target}/{name}")]
    assert 0 < tried(target, changed) <= len(changed)


def test_every_seed_through_every_target() -> None:
    """A file of one kind in the place of another is refused like any other bytes."""
    inputs = [data for target in TARGETS for data in seeds(target).values()]
    refused = {target: len(inputs) - tried(target, inputs) for target in TARGETS if target != "encoders"}
    assert all(refused.values())


def test_corpus_is_small() -> None:
    """Seeds stay small: there is a folder for each target and none besides."""
    assert sorted(path.name for path in CORPUS.iterdir()) == sorted(TARGETS)
    assert sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) < CORPUS_LIMIT_BYTES


def test_mutations_are_the_same_every_time() -> None:
    """A failure can be repeated: the changes follow from the seed and a name alone."""
    files = list(seeds("entry").values())
    first = list(mutations(files[0], files, 200, "name"))
    assert first == list(mutations(files[0], files, 200, "name"))
    assert first != list(mutations(files[0], files, 200, "other"))


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="the extra fuzz is not installed")
def test_the_real_fuzzer_runs(tmp_path: Path) -> None:
    """With atheris installed a target runs under it, guided by the coverage of this package's code."""
    # Through a shell that forks: Linux hands the peak memory of who calls exec on, and the fuzzer would judge ours.
    result = subprocess.run(
        ["sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-m", "tests.fuzz.fuzz", "slot", "2"],
        cwd=ROOT,
        env=os.environ | {"CIUIC_FUZZ_FOUND": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    covered = [int(line.split("cov: ")[1].split()[0]) for line in result.stderr.splitlines() if "cov: " in line]
    assert covered[-1] > 100, "the package is not instrumented"
    assert not list(tmp_path.iterdir())
