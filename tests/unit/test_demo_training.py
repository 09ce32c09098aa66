"""The demo's training program and the pure parts of the demo, without any engine."""

from __future__ import annotations

import argparse
import copy
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ciuic_async.cli import demo, demo_table, demo_training
from ciuic_async.cli.demo import Child, Kill, Life, Watch, compare, exit_status, plan_kills, render, render_table
from ciuic_async.cli.demo_table import Measured, Schedule, summarize
from ciuic_async.cli.demo_training import SIZES, ShuffledWindows, Training, digest, digests, read_text
from ciuic_async.errors import InternalError, UsageError

TINY = SIZES["tiny"]


@pytest.fixture(autouse=True)
def _leave_torch_as_it_was() -> Iterator[None]:
    """``Training`` sets process-wide switches, as a program may."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    generator = torch.get_rng_state()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    torch.set_rng_state(generator)


def test_the_text_is_long_enough_and_the_same_each_time() -> None:
    """Every Python carries enough text for an epoch of the largest model, and reads it in a fixed order."""
    text = read_text()
    large = SIZES["large"]
    assert len(text) > large.context * large.batch * large.epoch_batches
    assert text == read_text()
    assert len(read_text(1000)) == 1000


def test_an_epoch_shows_no_window_twice_and_the_next_has_another_order() -> None:
    """The loader draws without replacement, and shuffles anew."""
    loader = ShuffledWindows(bytes(range(256)) * 40, TINY, seed=1)
    epochs = [[loader.next_batch()[0] for _ in range(TINY.epoch_batches)] for _ in range(2)]
    orders = [loader.state_dict()["order"].tolist()]
    loader.next_batch()
    orders.append(loader.state_dict()["order"].tolist())
    assert loader.epoch == 3
    assert loader.batch == 1
    assert all(len(set(order)) == len(order) == TINY.epoch_batches * TINY.batch for order in orders)
    assert orders[0] != orders[1]
    assert not torch.equal(torch.cat(epochs[0]), torch.cat(epochs[1]))


@given(before=st.integers(0, 20), after=st.integers(1, 12))
def test_a_loader_goes_on_with_exactly_the_next_batch(before: int, after: int) -> None:
    """load_state_dict(state_dict()) is the same loader, at any place, and later use does not change the state taken."""
    text = read_text(1 << 14)
    one = ShuffledWindows(text, TINY, seed=3)
    for _ in range(before):
        one.next_batch()
    state = one.state_dict()
    expected = [one.next_batch() for _ in range(after)]
    other = ShuffledWindows(text, TINY, seed=99)
    other.load_state_dict(state)
    for tokens, following in expected:
        found_tokens, found_following = other.next_batch()
        assert torch.equal(found_tokens, tokens)
        assert torch.equal(found_following, following)


def test_targets_follow_their_tokens() -> None:
    """What the model must predict is the text, one byte on."""
    text = read_text(1 << 14)
    tokens, following = ShuffledWindows(text, TINY, seed=3).next_batch()
    assert tokens.shape == following.shape == (TINY.batch, TINY.context)
    assert torch.equal(tokens[:, 1:], following[:, :-1])
    assert bytes([*tokens[0].tolist(), int(following[0, -1])]) in text


def test_two_uninterrupted_runs_are_bit_identical_and_learn() -> None:
    """Training is deterministic, so that any difference after a kill is the engine's; and it does train."""
    one = demo_training.train_uninterrupted(TINY, 40, lambda line: None)
    expected = digests(one)
    other = demo_training.train_uninterrupted(TINY, 40, lambda line: None)
    assert digests(other) == expected
    assert other.curve.losses[-1] < other.curve.losses[0] - 0.5


def test_state_and_generators_are_all_that_training_depends_on() -> None:
    """A run continued from the state by name and the generators' states equals one that was not interrupted."""
    whole = Training(TINY, 20)
    for _ in range(11):
        whole.update()
    state = copy.deepcopy({name: part.state_dict() for name, part in whole.state().items()})
    generators = torch.get_rng_state(), random.getstate()
    for _ in range(9):
        whole.update()
    expected = digests(whole)

    resumed = Training(TINY, 20)
    for name, part in resumed.state().items():
        part.load_state_dict(state[name])
    torch.set_rng_state(generators[0])
    random.setstate(generators[1])
    assert resumed.steps_done == 11
    while resumed.steps_done < 20:
        resumed.update()
    assert digests(resumed) == expected


def test_dropout_draws_from_the_generator() -> None:
    """A resumed run with another generator state ends differently: the demo would notice a lost one."""
    expected = digests(demo_training.train_uninterrupted(TINY, 6, lambda line: None))
    other = Training(TINY, 6)
    torch.manual_seed(12345)
    while other.steps_done < 6:
        other.update()
    found = digests(other)
    assert found["parameters"] != expected["parameters"]
    assert found["rng"] != expected["rng"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.tensor([0.0]), torch.tensor([-0.0])),
        (torch.tensor([1.0]), torch.tensor([1.0000001])),
        (torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64)),
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (0.1, 0.1 + 2**-56),
        (1, 1.0),
        (1, True),
        ([1, 2], (1, 2)),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ([[1], 2], [[1, 2]]),
        (None, "None"),
    ],
)
def test_a_digest_tells_any_two_states_apart(one: Any, other: Any) -> None:
    """Values, types, shapes, signs of zero and structure all count."""
    assert digest(one) != digest(other)
    assert digest(one) == digest(copy.deepcopy(one))


def test_a_digest_refuses_what_it_does_not_know() -> None:
    """A type without a rule is an error: it would compare equal by accident."""
    with pytest.raises(TypeError, match="set"):
        digest({"a": {1, 2}})


@given(every=st.integers(1, 12), stretches=st.integers(2, 8), count=st.integers(0, 5), seed=st.integers(0, 1 << 32))
def test_kills_are_ordered_distinct_and_one_falls_into_a_write(
    every: int, stretches: int, count: int, seed: int
) -> None:
    """Planned kills come after the first snapshot, before the end, and one is at the moment of a snapshot."""
    steps = every * stretches + 5
    try:
        kills = plan_kills(count, steps, every, random.Random(seed))
    except UsageError:
        assert count > steps - every - 3
        return
    assert len(kills) == count
    where = [kill.step for kill in kills]
    assert where == sorted(set(where))
    assert all(every <= step < steps for step in where)
    in_write = [kill for kill in kills if kill.in_write]
    assert len(in_write) == min(1, count)
    assert all(kill.step % every == 0 and kill.step - 1 not in where for kill in in_write)


def test_too_few_steps_for_a_kill_are_refused() -> None:
    """Without a snapshot before the end there is nothing to resume from: the message says what to change."""
    with pytest.raises(UsageError, match="more than 5"):
        plan_kills(1, 5, 5, random.Random(0))
    with pytest.raises(UsageError, match="at most"):
        plan_kills(50, 30, 5, random.Random(0))
    assert plan_kills(0, 5, 5, random.Random(0)) == []


def test_a_report_is_understood_line_by_line() -> None:
    """A life knows where it began, how far it came, and which snapshots were under way at its end."""
    life = Life()
    for line in ["started 10", "step 11 3.1", "snapshot 15", "durable 15", "step 16 2.9", "snapshot 20", "step 21 2.8"]:
        life.note(line)
    assert (life.started, life.step, life.unfinished) == (10, 21, [20])
    assert life.note('done {"loss": 2.5}') == "done"
    assert life.result == {"loss": 2.5}


def test_lines_that_a_killed_child_had_written_are_still_read() -> None:
    """Nothing a child reported before SIGKILL is lost, and waiting for more of it has a limit."""
    program = "import os, signal; os.write(1, b'one\\ntwo\\nthr'); os.write(1, b'ee\\nhalf'); signal.pause()"
    with Child([sys.executable, "-c", program]) as child:
        assert [child.next_line(60) for _ in range(3)] == ["one", "two", "three"]
        with pytest.raises(TimeoutError):
            child.next_line(0.01)
        child.kill()
        assert child.next_line(60) is None
        assert child.end() == -9


def test_a_child_that_fails_is_an_error() -> None:
    """A training program that ends by itself without a result is reported, with its exit status."""
    with pytest.raises(InternalError, match="status 7") as caught:
        demo.live([sys.executable, "-c", "raise SystemExit(7)"], None, Watch(1))
    assert caught.value.kind == "demo_child"


def test_a_child_is_killed_only_when_its_time_has_come() -> None:
    """The kill falls after the planned step's line; a child that was to die in a write dies at that snapshot's line."""
    reports = ["started 0", "step 1 3.0", "snapshot 2", "step 2 3.0", "snapshot 4", "step 3 3.0"]
    program = f"import signal\nfor line in {reports!r}: print(line, flush=True)\nsignal.pause()"
    late = demo.live([sys.executable, "-c", program], Kill(3), Watch(9))
    assert (late.killed, late.step, late.unfinished) == (True, 3, [2, 4])
    in_write = demo.live([sys.executable, "-c", program], Kill(1, in_write=True), Watch(9))
    assert in_write.killed
    assert 2 in in_write.unfinished


def test_the_command_imports_torch_only_in_its_children() -> None:
    """``ciuic --help`` stays quick: the demo's own process needs no torch to be imported."""
    program = "import sys, ciuic_async.cli.demo; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_lost_time_is_the_difference_to_the_same_round_per_snapshot() -> None:
    """Each round is compared with its own step time without snapshots; the median of the rounds is taken."""
    schedule = Schedule(steps=8, every_steps=4)
    assert schedule.due == {2, 6}
    without = Measured([8.0, 10.0, 9.0], [8, 8, 8])
    one = Measured([8.2, 13.5, 9.4], [8, 10, 8], [0.1, 0.3, 0.2], 5)  # in round 2 it took two steps more
    measured = {"none": without, "x": one}
    table = summarize(measured, schedule)
    assert (table["step_s_min"], table["step_s"], table["step_s_max"]) == (1.0, 9.0 / 8, 10.0 / 8)
    assert table["rounds"] == 3
    assert table["contenders"]["x"] == pytest.approx(
        {"stall_s": 0.2, "lost_s_per_snapshot": 0.2, "lost_s_min": 0.1, "lost_s_max": 0.5, "stored_bytes": 5}
    )


def test_a_snapshot_in_the_table_is_always_followed_by_training() -> None:
    """Otherwise the table would measure how long a save takes, not how much of it training feels."""
    for every in range(2, 9):
        for stretches in range(1, 5):
            due = Schedule(every * stretches, every).due
            assert len(due) == stretches
            assert max(due) < every * stretches


@pytest.mark.parametrize("name", ["none", "torch.save + fsync", "dcp.async_save"])
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_opponent_saves_the_whole_state_and_cleans_up(name: str, tmp_path: Path) -> None:
    """One turn of each opponent on the tiny model: as many stalls as snapshots, bytes on disk, nothing left behind."""
    training = Training(TINY, 100)
    training.update()
    measured = Measured()
    schedule = Schedule(4, 2)
    demo_table.run_once(name, training, tmp_path / "turn", schedule, measured)
    assert len(measured.wall_s) == 1
    assert len(measured.stall_s) == len(schedule.due)
    assert measured.steps[0] >= schedule.steps
    assert training.steps_done == 1 + demo_table.WARM_UP_SNAPSHOTS + measured.steps[0]
    least_bytes = 0 if name == "none" else demo_table.tensor_bytes(training)
    assert measured.stored_bytes >= least_bytes
    assert list(tmp_path.iterdir()) == []


def facts(**changed: Any) -> dict[str, Any]:
    one = {"stall_s": 0.03, "lost_s_per_snapshot": 0.04, "lost_s_min": 0.02, "lost_s_max": 0.05, "stored_bytes": 10**8}
    return {
        "identical": True,
        "chain": "",
        "kills": 3,
        "snapshots": 12,
        "raw_bytes": 480_000_000,
        "stored_bytes": 400_000_000,
        "compared": {"parameters": True, "optimizer": True, "rng": True, "loss_curve": True},
        "verified": True,
        "killed_in_write": 1,
        "measured": {
            "state_bytes": 129_000_000,
            "threads": [1, 2],
            "step_s": 0.2,
            "step_s_min": 0.19,
            "step_s_max": 0.21,
            "every_steps": 4,
            "rounds": 3,
            "contenders": {"ciuic-async": one, "torch.save + fsync": one},
        },
        **changed,
    }


def test_the_verdict_is_the_last_line_and_names_what_differs() -> None:
    """A reader who looks at the last line knows the result."""
    text = render(facts())
    assert text.splitlines()[-1].startswith("Identical: killed 3 times")
    assert max(map(len, text.splitlines())) <= 120
    assert "\x1b" not in text
    different = render(facts(compared={"parameters": True, "loss_curve": False}))
    assert different.splitlines()[-1] == "NOT IDENTICAL: the interrupted run differs in loss curve."
    assert render(facts(verified=False)).splitlines()[-1].startswith("NOT VERIFIED")


def test_a_busy_machine_is_said_to_be_busy() -> None:
    """Figures from a run whose baseline wobbles come with a warning, others without."""
    table = facts()["measured"]
    assert not any("busy" in line for line in render_table(table))
    assert any("busy" in line for line in render_table({**table, "step_s_max": 0.4}))


def test_runs_are_equal_only_if_every_part_is() -> None:
    """A part that one run lacks counts as different."""
    assert compare({"a": "1", "b": "2"}, {"a": "1", "b": "3"}) == {"a": True, "b": False}
    assert compare({"a": "1"}, {"a": "1", "b": "3"}) == {"a": True, "b": False}


def test_the_exit_status_tells_whether_the_runs_were_identical() -> None:
    """0 only for identical runs whose chain verifies."""
    assert exit_status(facts()) == 0
    assert exit_status(facts(identical=False)) == 1
    assert exit_status(facts(verified=False)) == 1


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    """The demo writes into no folder that holds something."""
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(UsageError, match="not empty"):
        demo.run(parse("--quick", "--dir", str(tmp_path)))


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    demo.add_parser(parser.add_subparsers())
    return parser.parse_args(["demo", *arguments])
