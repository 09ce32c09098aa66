"""The benches: each runs in seconds with ``--quick`` and says what it found, and their arithmetic is right."""

from __future__ import annotations

import importlib
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench"
FEW = ["--contenders", "ciuic-async", "torch.save + fsync"]
QUESTIONS: dict[str, tuple[str, list[str]]] = {
    "lost_time": (
        "lost_time_cpu",
        ["--contenders", "none", "ciuic-async", "torchfoo", "torch.save + fsync", "dcp.async_save, cached stager"],
    ),
    "lost_time_by_interval": ("lost_time_by_interval", FEW),
    "where_time_goes": ("where_time_goes", []),
    "time_to_durable": ("time_to_durable", FEW),
    "codec": ("codec", []),
    "restore": ("restore", []),
    "restart": ("restart", []),
    "memory": ("memory", ["--contenders", "ciuic-async"]),
    "scaling": ("scaling", FEW),
    "kernels": ("kernels", []),
    "chain": ("chain", []),
    "overlap": ("overlap", []),
    "object_store": ("object_store", []),
    "crash": ("crash", ["--contenders", "ciuic-async", "torch.save"]),
}


DRIVER = """
import contextlib, importlib, json, pathlib, sys
bench, folder, questions = sys.argv[1], pathlib.Path(sys.argv[2]), json.loads(sys.argv[3])
sys.path.insert(0, bench)
from harness import opponents
from harness.contenders import Entry
def broken(folder, state):
    raise ModuleNotFoundError("No module named torchfoo")
opponents.CONTENDERS["torchfoo"] = Entry(broken, "")
if __name__ == "__main__":
    for program, arguments in questions.items():
        work = folder / "work" / program
        work.mkdir(parents=True)
        always = ["--quick", "--results", str(folder), "--folder", str(work)]
        with (folder / f"{program}.txt").open("w") as printed, contextlib.redirect_stdout(printed):
            importlib.import_module(program).main([*always, *arguments])
"""
"""All benches in one process: torch is imported once. They need one of their own, since opponents warn."""


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of ``bench/`` as the programs there do."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all benches write with ``--quick``, and what they print."""
    folder = tmp_path_factory.mktemp("answers")
    questions = {program: arguments for program, (_, arguments) in QUESTIONS.items()}
    command = [sys.executable, "-c", DRIVER, str(BENCH), str(folder), json.dumps(questions)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("program", QUESTIONS)
def test_every_question_is_answered_in_seconds(program: str, answers: Path) -> None:
    """With ``--quick`` each bench writes facts about machine, versions and itself, and leaves no checkpoint."""
    name, _ = QUESTIONS[program]
    result = json.loads((answers / f"{name}.json").read_text())
    printed = (answers / f"{program}.txt").read_text()
    assert result["quick"]
    assert {"machine", "engine", "versions", "question", "method", "table"} <= result.keys()
    assert len(result["table"]) >= 2
    assert all("| " + " | ".join(row) + " |" in printed for row in result["table"])
    assert not list((answers / "work" / program).iterdir())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_does_not_run_here_is_left_out_with_its_reason(answers: Path) -> None:
    """A contender that cannot save is named in the result with the reason, and the others are measured."""
    result = json.loads((answers / "lost_time_cpu.json").read_text())
    assert result["missing"] == {"torchfoo": "ModuleNotFoundError: No module named torchfoo"}
    assert list(result["contenders"]) == ["none", "ciuic-async", "torch.save + fsync", "dcp.async_save, cached stager"]
    assert result["ratio_to_best_opponent"]["best_opponent"] in result["contenders"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_report_shows_every_answer(answers: Path) -> None:
    """One page with all questions, with or without matplotlib, and one that says quick runs prove nothing."""
    done = subprocess.run(
        [sys.executable, str(BENCH / "report.py"), "--results", str(answers)],
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    page = (answers / "report.html").read_text()
    assert page.count("<h2 ") == page.count("A quick run") == len(QUESTIONS)
    drawn = page.count("data:image/png;base64,")
    assert drawn >= len(QUESTIONS) or "matplotlib is not installed" in page


def test_a_question_has_one_file_and_every_file_is_tested() -> None:
    """No bench without a smoke test (``interval_control`` has its own), and none that is not there."""
    programs = {path.stem for path in BENCH.glob("[a-z]*.py")} - {"report", "interval_control"}
    assert programs == set(QUESTIONS)


# --- arithmetic -------------------------------------------------------------------------------------------------------


def _coverage(count: int, rank: int) -> float:
    """Probability that the median lies between the ``rank``-th smallest and largest of ``count``."""
    return 1 - 2 * sum(math.comb(count, number) * 0.5**count for number in range(rank))


@pytest.mark.parametrize("count", [*range(6, 40), 100, 301])
def test_the_interval_of_the_median_is_exact(harness: Any, count: int) -> None:
    """It covers the median with at least 95%, and the next narrower pair of samples would not."""
    samples = list(range(1, count + 1))
    low, high = harness("harness.intervals").median_interval(samples[::-1])
    assert high == count + 1 - low
    assert _coverage(count, low) >= 0.95 > _coverage(count, low + 1)


@pytest.mark.parametrize("count", range(6))
def test_few_samples_have_no_interval(harness: Any, count: int) -> None:
    """Not even the extremes of five samples enclose the median with 95%: nothing is claimed."""
    assert harness("harness.intervals").median_interval([1.0] * count) is None


def test_the_trimmed_mean_ignores_an_outlier_on_each_side(harness: Any) -> None:
    """One step that hangs, or one that is freakishly fast, does not move the base."""
    trimmed = harness("harness.intervals").trimmed_mean
    assert trimmed([1.0, 1.0, 1.0, 1.0, 50.0, -50.0]) == 1.0
    assert trimmed([1.0, 3.0]) == 2.0


def _sample(harness: Any, lost_s: float, drift_s: float, round_number: int = 0) -> Any:
    """Three blocks of eight steps whose step time drifts evenly; ``lost_s`` is lost in the one in the middle."""
    steps_s = [0.5 + drift_s * number for number in range(24)]
    wall_s = sum(steps_s[8:16]) + lost_s
    blocks = tuple(steps_s[8:16]), tuple(steps_s[:8]), tuple(steps_s[16:])
    return harness("harness.lost").Sample(round_number, 1, 8, wall_s, 0.0, *blocks)


@pytest.mark.parametrize("drift_s", [0.0, 0.004, -0.01])
def test_a_steady_drift_cancels(harness: Any, drift_s: float) -> None:
    """Whatever a machine's speed does evenly over a turn, exactly what was lost comes out."""
    sample = _sample(harness, 0.2, drift_s)
    assert sample.lost_s == pytest.approx(0.2)
    assert sample.lost_plain_s == pytest.approx(0.2)


def test_the_contenders_own_time_is_a_plain_sum(harness: Any) -> None:
    """One slow step while a snapshot is under way is lost time, however much it looks like an outlier."""
    lost = harness("harness.lost")
    quiet = (0.5,) * 8
    slow = lost.Sample(0, 1, 8, 8 * 0.5 + 3.0, 0.0, (*quiet[1:], 3.5), quiet, quiet)
    assert slow.lost_s == pytest.approx(3.0)


def test_the_ratio_is_to_the_best_and_its_bound_covers_the_rounds(harness: Any) -> None:
    """Ours over the smallest median of the others; the bound lies between the ratio and that of the worst round."""
    intervals = harness("harness.intervals")
    ours = {number: [0.1 + 0.01 * number, 0.1] for number in range(5)}
    good = {number: [0.4, 0.4 + 0.02 * number] for number in range(5)}
    bad = {number: [2.0] for number in range(5)}
    found = intervals.ratio_to_best(ours, {"bad": bad, "good": good})
    middle = [statistics.median(value for samples in one.values() for value in samples) for one in (ours, good)]
    assert found["best_opponent"] == "good"
    assert found["ratio"] == pytest.approx(middle[0] / middle[1])
    assert found["ratio"] <= found["upper_bound_95"] <= 0.14 / 0.4
    assert found == intervals.ratio_to_best(ours, {"bad": bad, "good": good})


def test_a_turn_runs_as_many_steps_without_as_with(harness: Any, tmp_path: Path) -> None:
    """Blocks alternate, each WITH is followed by as many steps without, and training really did all of them."""
    lost, contenders = harness("harness.lost"), harness("harness.contenders")

    class Training:
        """Counts."""

        steps = 0

        def update(self) -> float:
            self.steps += 1
            return 0.0

        def state(self) -> dict[str, Any]:
            return {}

    class LateBy(contenders.NoSnapshots):  # type: ignore[misc, name-defined]  # imported by the fixture
        """Durable some steps after the call."""

        left = 0

        def save(self) -> None:
            self.left = 5

        def step(self) -> None:
            self.left -= 1

        def is_durable(self) -> bool:
            return self.left <= 0

    training = Training()
    plan = lost.Plan(steps=2, blocks=3)
    (samples,), stored = lost.turn(contenders.Entry(LateBy, ""), training, tmp_path / "turn", [plan], 7)
    assert [sample.steps for sample in samples] == [5, 5, 5]
    assert [len(sample.after_s) for sample in samples] == [5, 5, 5]
    assert [len(sample.before_s) for sample in samples] == [2, 5, 5]
    assert training.steps == lost.WARM_UP_SNAPSHOTS + 2 + 3 * 10
    assert {sample.round for sample in samples} == {7}
    assert stored == 0
    assert not (tmp_path / "turn").exists()


def test_the_report_needs_nothing_from_elsewhere(harness: Any) -> None:
    """The page of the committed results names every question, embeds its plots, and links to no other place."""
    report = harness("report")
    results = report.load(BENCH / "results")
    page = report.page(results, {name: [b"not really a PNG"] for name in results}, "")
    assert results
    assert page.count("<h2 ") == page.count("data:image/png;base64,") == len(results)
    assert "http" not in page
    assert "<script" not in page
    assert all(result["machine"] in page for result in results.values())
