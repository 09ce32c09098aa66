"""Restoring: what does not fit changes nothing, what is damaged is passed over or refused, and memory stays bounded."""

from __future__ import annotations

import enum
import re
import shutil
import subprocess
import sys
import textwrap
import types
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ciuic_async
from ciuic_async import (
    Checkpointer,
    CiuicWarning,
    IntegrityError,
    NotFoundError,
    SnapshotChain,
    StoreError,
    TargetMismatchError,
    UsageError,
    native,
)
from ciuic_async.capture.tensors import empty
from ciuic_async.format import layout
from ciuic_async.pipeline.commit import Resolved
from ciuic_async.pipeline.restore import load_tree
from ciuic_async.transparency.keys import SigningKey
from ciuic_async.transparency.slots import encode_slot
from tests.strategies import fingerprint


def _flip(path: Path, at: int) -> None:
    """Change one bit of a file that the chain has made read-only."""
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def _state() -> dict[str, Any]:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer, "plain": [1]}


def _values(state: dict[str, Any]) -> Any:
    return fingerprint(
        [value.state_dict() if hasattr(value, "state_dict") else value for value in state.values()]
        + [torch.get_rng_state()]
    )


# --- what does not fit ------------------------------------------------------------------------------------------------


def _smaller(state: dict[str, Any]) -> None:
    state["model"][2] = nn.Linear(8, 3)


def _other_dtype(state: dict[str, Any]) -> None:
    state["model"][0].bfloat16()


def _more_layers(state: dict[str, Any]) -> None:
    state["model"].append(nn.Linear(2, 2))


def _fewer_layers(state: dict[str, Any]) -> None:
    del state["model"][2]


def _newly_tied(state: dict[str, Any]) -> None:
    state["model"][0].bias = state["model"][1].bias


def _buffer_emptied(state: dict[str, Any]) -> None:
    state["model"][1].running_mean = torch.empty(0)


def _more_objects(state: dict[str, Any]) -> None:
    state["ema"] = nn.Linear(1, 1)


def _fewer_objects(state: dict[str, Any]) -> None:
    del state["plain"]


def _fewer_parameters(state: dict[str, Any]) -> None:
    state["optimizer"] = torch.optim.SGD(list(state["model"].parameters())[:2], lr=0.1)


def _more_groups(state: dict[str, Any]) -> None:
    parameters = list(state["model"].parameters())
    state["optimizer"] = torch.optim.SGD([{"params": parameters[:1]}, {"params": parameters[1:]}], lr=0.1)


MISMATCHES: dict[str, tuple[Callable[[dict[str, Any]], None], list[str]]] = {
    "shape": (_smaller, ["model.2.weight: shape [2, 8]", "model.2.bias: shape [2]"]),
    "dtype": (_other_dtype, ["model.0.weight: dtype float32 in the snapshot, bfloat16", "model.0.bias"]),
    "missing": (_more_layers, ["model.3.weight: missing", "model.3.bias: missing"]),
    "unexpected": (_fewer_layers, ["model.2.weight: unexpected", "model.2.bias: unexpected"]),
    "newly tied": (_newly_tied, ["model.1.bias: shares its memory"]),
    "emptied": (_buffer_emptied, ["model.1.running_mean: shape [8]"]),
    "more objects": (_more_objects, ["ema: not in the snapshot"]),
    "fewer objects": (_fewer_objects, ["plain: in the snapshot, but not"]),
    "fewer parameters": (_fewer_parameters, ["optimizer.param_groups.0: 6 parameters in the snapshot, 2"]),
    "more groups": (_more_groups, ["optimizer: 1 parameter groups in the snapshot, 2"]),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_a_mismatch_is_listed_and_changes_nothing(name: str, tmp_path: Path) -> None:
    """The TargetMismatchError names every difference; no bit of any object, nor of the generators, is changed."""
    change, says = MISMATCHES[name]
    with Checkpointer(tmp_path / "chain", _state()) as ckpt:
        ckpt.save()
    state = _state()
    change(state)
    with Checkpointer(tmp_path / "chain", state) as ckpt:
        before = _values(state)
        with pytest.raises(TargetMismatchError) as mismatch:
            ckpt.restore()
        assert _values(state) == before
    for text in says:
        assert text in str(mismatch.value)


@pytest.mark.parametrize("name", MISMATCHES)
def test_without_strict_what_fits_is_loaded(name: str, tmp_path: Path) -> None:
    """strict=False loads every entry that fits, and reports the others in Progress.mismatches."""
    change, says = MISMATCHES[name]
    saved = _state()
    with Checkpointer(tmp_path / "chain", saved) as ckpt:
        ckpt.save()
    state = _state()
    change(state)
    with Checkpointer(tmp_path / "chain", state) as ckpt:
        progress = ckpt.restore(strict=False)
    assert progress is not None
    for text in says:
        assert any(text in found for found in progress.mismatches)
    expected, found = saved["model"].state_dict(), state["model"].state_dict()
    fits = [
        key for key in expected if key in found and not any(f"model.{key}:" in text for text in progress.mismatches)
    ]
    if name == "newly tied":
        fits.remove("1.bias" if "1.bias" in fits else "0.bias")
    assert len(fits) >= 5
    for key in fits:
        assert fingerprint(found[key]) == fingerprint(expected[key]), key


def test_every_difference_is_listed_at_once(tmp_path: Path) -> None:
    """One error lists the differences of all objects."""
    with Checkpointer(tmp_path / "chain", _state()) as ckpt:
        ckpt.save()
    state = _state()
    for change in (_smaller, _more_objects, _fewer_objects, _more_groups):
        change(state)
    with Checkpointer(tmp_path / "chain", state) as ckpt, pytest.raises(TargetMismatchError) as mismatch:
        ckpt.restore()
    for text in ("model.2.weight", "ema", "plain", "optimizer"):
        assert text in str(mismatch.value)


def test_an_object_that_refuses_its_state_is_named(tmp_path: Path) -> None:
    """What load_state_dict raises becomes a TargetMismatchError with its cause."""

    class Picky:
        def state_dict(self) -> dict[str, int]:
            return {"version": 1}

        def load_state_dict(self, state: dict[str, int]) -> None:
            raise KeyError("too old")

    with Checkpointer(tmp_path / "chain", {"picky": Picky()}) as ckpt:
        ckpt.save()
        with pytest.raises(TargetMismatchError, match=r"picky.*Picky.*too old") as mismatch:
            ckpt.restore()
    assert isinstance(mismatch.value.__cause__, KeyError)


def test_a_one_off_snapshot_of_a_single_tree_is_no_training_state(tmp_path: Path) -> None:
    """restore() of what save() stored as one list says how to load it instead."""
    ciuic_async.save([1, 2], tmp_path / "chain")
    with Checkpointer(tmp_path / "chain", {"n": 1}) as ckpt, pytest.raises(TargetMismatchError, match="load"):
        ckpt.restore()


def test_a_state_mapping_that_cannot_change_is_copied(tmp_path: Path) -> None:
    """With an immutable mapping the objects are restored all the same."""
    from types import MappingProxyType

    model = nn.Linear(2, 2)
    with Checkpointer(tmp_path / "chain", MappingProxyType({"model": model, "n": 1})) as ckpt:
        ckpt.save()
        expected = fingerprint(model.state_dict())
        model.weight.data.zero_()
        ckpt.restore()
    assert fingerprint(model.state_dict()) == expected


# --- damage -----------------------------------------------------------------------------------------------------------


def _three(chain: Path, weight: torch.Tensor) -> list[str]:
    with Checkpointer(chain, {"w": weight}, every_steps=1, codec="raw", rng=False) as ckpt:
        pendings = []
        for value in range(1, 4):
            weight.fill_(value)
            pendings.append(ckpt.step(batch=value))
        return [pending.wait_durable(30).id for pending in pendings if pending is not None]


def _flip_segment(chain: Path, snapshot: str) -> None:
    _flip(chain / layout.segment(snapshot, 0, 0), 5000)


def _delete_segment(chain: Path, snapshot: str) -> None:
    (chain / layout.segment(snapshot, 0, 0)).unlink()


def _delete_root(chain: Path, snapshot: str) -> None:
    (chain / "manifests" / snapshot / "root.json").unlink()


def _flip_part(chain: Path, snapshot: str) -> None:
    _flip(next(p for p in (chain / "manifests" / snapshot).iterdir() if p.name != "root.json"), 40)


def _delete_locator(chain: Path, snapshot: str) -> None:
    (chain / layout.locator(snapshot, 0)).unlink()


DAMAGE = [_flip_segment, _delete_segment, _delete_root, _flip_part, _delete_locator]


@pytest.mark.damages
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__[1:])
def test_latest_falls_back_over_damage(damage: Callable[[Path, str], None], tmp_path: Path) -> None:
    """The newest good snapshot is restored; a warning and Progress.skipped name what was passed over and why."""
    chain, weight = tmp_path / "chain", torch.zeros(5000)
    ids = _three(chain, weight)
    damage(chain, ids[2])
    weight.fill_(9)
    with Checkpointer(chain, {"w": weight}, rng=False) as ckpt:
        with pytest.warns(CiuicWarning, match=ids[2]):
            progress = ckpt.restore()
        assert progress is not None
        assert progress.snapshot.id == ids[1]
        assert (progress.step, progress.batch) == (2, 2)
        assert [snapshot for snapshot, _ in progress.skipped] == [ids[2]]
        assert weight.tolist() == [2.0] * 5000
        after = ckpt.save().wait_durable(30)
    assert after.parent == ids[1]
    assert torch.equal(after.load()["w"], weight), "what follows does not lean on the damaged one"


@pytest.mark.damages
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__[1:])
def test_a_named_snapshot_never_falls_back(damage: Callable[[Path, str], None], tmp_path: Path) -> None:
    """An explicit ref means that snapshot: damage is an IntegrityError, and load() falls back nowhere."""
    chain, weight = tmp_path / "chain", torch.zeros(5000)
    ids = _three(chain, weight)
    damage(chain, ids[2])
    with Checkpointer(chain, {"w": weight}, rng=False) as ckpt:
        for ref in (ids[2], "step:3"):
            with pytest.raises(IntegrityError):
                ckpt.restore(ref)
        assert ckpt.restore("step:2") is not None
    with pytest.raises(IntegrityError):
        ciuic_async.load(chain)


@pytest.mark.damages
@pytest.mark.parametrize("core", [True, False], ids=["native", "plain"])
def test_damage_never_reaches_a_live_model(core: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters, which are filled in place, hold the older snapshot after a fallback, and not the flipped bit; by name
    it is an error."""
    if not core:
        monkeypatch.setattr(native, "core", None)
    chain, model = tmp_path / "chain", nn.Linear(300, 300)
    with Checkpointer(chain, {"model": model}, codec="raw", rng=False) as ckpt:
        for value in (1.0, 2.0):
            model.weight.data.fill_(value)
            newest = ckpt.save().wait_durable(30)
    _flip(chain / layout.segment(newest.id, 0, 0), 200_000)
    with Checkpointer(chain, {"model": model}, rng=False) as ckpt:
        with pytest.raises(IntegrityError, match=r"model\.weight") as caught:
            ckpt.restore(newest.id)
        assert caught.value.kind == "digest_mismatch"
        with pytest.warns(CiuicWarning, match=newest.id):
            assert ckpt.restore() is not None
        assert bool((model.weight == 1).all())


def _fork(chain: Path, seen: Path) -> None:
    """Put another history by the same key in place of the one that was seen."""
    with pytest.MonkeyPatch.context() as patch:  # somebody else does so, whose pins are not ours
        patch.setenv("XDG_STATE_HOME", str(seen.parent / "elsewhere"))
        ciuic_async.save({"w": torch.full((5000,), 7.0)}, seen)
        ciuic_async.save({"w": torch.full((5000,), 8.0)}, seen)
    for folder in ("log", "segments", "manifests", "locators"):
        shutil.rmtree(chain / folder)
    shutil.copytree(seen, chain, dirs_exist_ok=True)


def _forge(chain: Path, seen: Path) -> None:
    """Append an entry that a key signed which the log does not know."""
    with SnapshotChain(chain) as opened:
        head = opened.target().log.refresh()
        note = encode_slot(head, [opened.target().log.entry_bytes(1)], SigningKey.generate(), opened.origin)
    (chain / layout.slot(head.size)).write_bytes(note)


@pytest.mark.damages
@pytest.mark.parametrize("attack", [_fork, _forge], ids=lambda f: f.__name__[1:])
def test_latest_never_falls_back_over_a_fork_or_a_forgery(attack: Callable[[Path, Path], None], tmp_path: Path) -> None:
    """A history that is not the one seen before, or an entry by a stranger, is an error: no older snapshot is taken
    for the newest one, and nothing is changed."""
    chain, copied, weight = tmp_path / "chain", tmp_path / "copy", torch.zeros(5000)
    _three(chain, weight)
    shutil.copytree(chain, copied)
    with Checkpointer(chain, {"w": weight}, rng=False) as ckpt:
        ckpt.save().wait_durable(30)
        weight.fill_(9)
        attack(chain, copied)
        with pytest.raises(IntegrityError) as caught:
            ckpt.restore()
    assert caught.value.kind in ("fork", "slot_mismatch", "signer_unknown")
    assert weight.tolist() == [9.0] * 5000


@pytest.mark.damages
def test_when_nothing_is_good_it_says_so(tmp_path: Path) -> None:
    """All damaged: every snapshot is tried and warned about, then an IntegrityError tells what to do."""
    chain, weight = tmp_path / "chain", torch.zeros(5000)
    for snapshot in _three(chain, weight):
        _flip_segment(chain, snapshot)
    with Checkpointer(chain, {"w": weight}, rng=False) as ckpt:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with pytest.raises(IntegrityError, match=r"none of 3 snapshots.*ciuic verify"):
                ckpt.restore()
        assert len([w for w in caught if w.category is CiuicWarning]) == 3


@pytest.mark.damages
def test_damage_names_the_tensor(tmp_path: Path) -> None:
    """The IntegrityError says which tensor in which file."""
    state = {"model": {"good": torch.zeros(100_000), "bad": torch.ones(100_000)}}
    snapshot = ciuic_async.save(state, tmp_path / "chain", codec="raw")
    path = tmp_path / "chain" / layout.segment(snapshot.id, 0, 0)
    at = path.read_bytes().index(torch.ones(8).numpy().tobytes())
    _flip(path, at + 1000)
    with pytest.raises(IntegrityError, match=r"model\.bad") as damage:
        ciuic_async.load(tmp_path / "chain")
    assert damage.value.where == layout.segment(snapshot.id, 0, 0)
    assert torch.equal(ciuic_async.load(tmp_path / "chain", only="model.good")["model"]["good"], torch.zeros(100_000))


# --- where training stands --------------------------------------------------------------------------------------------


POSITIONS: list[Any] = [
    0,
    -1,
    2**70,
    "epoch 3",
    {"shard": 7, "offset": (1, 2)},
    (1, "a"),
    2.5,
    None,
    True,
    "x" * 5000,
    "a\nb",
]


@pytest.mark.parametrize("value", POSITIONS, ids=range(len(POSITIONS)))
def test_epoch_and_batch_come_back_verbatim(value: Any, tmp_path: Path) -> None:
    """Whatever plain value they are, type and content are the same; so is the step."""
    with Checkpointer(tmp_path / "chain", {"n": 1}, every_steps=1) as ckpt:
        ckpt.step(epoch=value, batch=[value])
    with Checkpointer(tmp_path / "chain", {"n": 1}) as ckpt:
        progress = ckpt.restore()
        assert progress is not None
        assert (progress.step, type(progress.epoch)) == (1, type(value))
        assert fingerprint([progress.epoch, progress.batch]) == fingerprint([value, [value]])
        ckpt.save()
        again = ckpt.restore()
        assert again is not None
        assert again.epoch == value


def test_a_fresh_start_is_none(tmp_path: Path) -> None:
    """Without a snapshot restore() gives None, but a ref is asked for in vain."""
    with Checkpointer(tmp_path / "chain", {"n": 1}) as ckpt:
        assert ckpt.restore() is None
        with pytest.raises(NotFoundError, match="holds no snapshot yet"):
            ckpt.restore("step:3")


def test_another_environment_is_named(tmp_path: Path) -> None:
    """A different number of threads changes sums: the warning says what was and what is."""
    threads = torch.get_num_threads()
    with Checkpointer(tmp_path / "chain", {"n": 1}) as ckpt:
        ckpt.save()
    torch.set_num_threads(threads + 1)
    try:
        with (
            Checkpointer(tmp_path / "chain", {"n": 1}) as ckpt,
            pytest.warns(CiuicWarning, match=rf"threads {threads} -> {threads + 1}"),
        ):
            ckpt.restore()
    finally:
        torch.set_num_threads(threads)


def test_counting_goes_on_after_a_restore(tmp_path: Path) -> None:
    """Steps go on from the restored one, on the same schedule, and the new snapshot's parent is the restored one."""
    with Checkpointer(tmp_path / "chain", {"n": 1}, every_steps=2) as ckpt:
        for _ in range(5):
            ckpt.step()
        ckpt.restore("step:2")
        assert ckpt.step() is None
        pending = ckpt.step()
        assert pending is not None
        snapshot = pending.wait_durable(30)
    assert snapshot.step == 4
    chain = SnapshotChain(tmp_path / "chain")
    assert [found.step for found in chain] == [2, 4, 4]
    assert snapshot.parent == next(iter(chain)).id


def test_a_missing_generator_state_is_reported(tmp_path: Path) -> None:
    """A snapshot without random numbers restores, and Progress.mismatches says so."""
    with Checkpointer(tmp_path / "chain", {"n": 1}, rng=False) as ckpt:
        ckpt.save()
    with Checkpointer(tmp_path / "chain", {"n": 1}) as ckpt:
        progress = ckpt.restore()
    assert progress is not None
    assert "rng=False" in progress.mismatches[0]


# --- memory -----------------------------------------------------------------------------------------------------------

RESTORE_IN_LITTLE_MEMORY = """
    import resource, sys, threading
    import torch, ciuic_async

    def high_water():
        return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024

    model = torch.nn.ParameterList([torch.nn.Parameter(torch.rand(1 << 20)) for _ in range(48)])  # 192 MB
    with ciuic_async.Checkpointer(sys.argv[1], {"model": model}) as ckpt:
        if sys.argv[2] == "save":
            ckpt.save()
        else:
            open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts again
            before = high_water()
            assert ckpt.restore() is not None
            print(high_water() - before)
"""


@pytest.mark.slow
def test_restoring_a_model_takes_no_second_model(tmp_path: Path) -> None:
    """192 MB of parameters are filled with less than a third of that in further memory at any time."""
    grown = ""
    for action in ("save", "restore"):
        grown = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(RESTORE_IN_LITTLE_MEMORY), str(tmp_path / "chain"), action],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    assert int(grown) < 64 << 20


def test_a_ref_that_is_none_is_a_usage_error(tmp_path: Path) -> None:
    """An empty ref means nothing."""
    with Checkpointer(tmp_path / "chain", {"n": 1}) as ckpt, pytest.raises(UsageError):
        ckpt.restore("")


# --- plain trees that do not fit --------------------------------------------------------------------------------------

PLAIN_MISMATCHES: dict[str, tuple[Any, Any, str]] = {
    "shape": (torch.ones(4), torch.zeros(5), r"plain: shape \[4\] in the snapshot, \[5\]"),
    "dtype": ({"a": torch.ones(4)}, {"a": torch.zeros(4).double()}, r"plain\.a: dtype float32.*float64"),
    "missing tensor": ({"n": 1}, {"n": 1, "ema": torch.zeros(4)}, r"plain\.ema: no tensor in the snapshot"),
    "shorter list": ([torch.ones(2)], [torch.zeros(2), torch.zeros(2)], r"plain\.1: no tensor in the snapshot"),
    "other container": ([torch.ones(2)], (torch.zeros(2),), r"plain\.0: no tensor in the snapshot"),
    "inside a tuple": ((1, torch.ones(2)), (1, torch.zeros(3)), r"plain\.1: shape \[2\]"),
    "array shape": ({"a": np.ones(3)}, {"a": np.zeros(4)}, r"plain\.a: shape \[3\] in the snapshot, \[4\]"),
    "array dtype": ({1: np.ones(3)}, {1: np.zeros(3, np.float32)}, r"plain\.1: dtype <f8 in the snapshot, <f4"),
    "array for tensor": ({"a": torch.ones(3)}, {"a": np.zeros(3)}, r"plain\.a: no array in the snapshot"),
}


@pytest.mark.parametrize("name", PLAIN_MISMATCHES)
def test_live_tensors_of_plain_trees_must_fit(name: str, tmp_path: Path) -> None:
    """A live tensor or array that the snapshot cannot fill is a mismatch: an error, or reported without strict."""
    saved, live, says = PLAIN_MISMATCHES[name]
    with Checkpointer(tmp_path / "chain", {"plain": saved}, rng=False) as ckpt:
        ckpt.save()
    before = fingerprint(live)
    state = {"plain": live}
    with Checkpointer(tmp_path / "chain", state, rng=False) as ckpt:
        with pytest.raises(TargetMismatchError, match=says):
            ckpt.restore()
        assert state["plain"] is live
        assert fingerprint(live) == before
        progress = ckpt.restore(strict=False)
    assert progress is not None
    assert len(progress.mismatches) == 1
    assert re.search(says, progress.mismatches[0])


def test_plain_values_of_plain_trees_may_come_and_go(tmp_path: Path) -> None:
    """Keys and items without live tensors are values, and a saved tensor comes to where there was none."""
    saved = {"seen": [1, 2], "new": {"x": 1}, "best": torch.ones(2), "ema": torch.ones(3)}
    with Checkpointer(tmp_path / "chain", {"plain": saved}, rng=False) as ckpt:
        ckpt.save()
    ema = torch.zeros(3)
    live: dict[str, Any] = {"seen": [], "old": (1, "a"), "best": None, "ema": ema}
    with Checkpointer(tmp_path / "chain", {"plain": live}, rng=False) as ckpt:
        progress = ckpt.restore()
    assert progress is not None
    assert progress.mismatches == ()
    assert fingerprint(live) == fingerprint({"seen": [1, 2], "new": {"x": 1}, "best": torch.ones(2), "ema": ema})
    assert torch.equal(ema, torch.ones(3))


# --- live memory that overlaps ----------------------------------------------------------------------------------------


class Halves(nn.Module):
    """Two buffers on memory of their own, or as given."""

    def __init__(self, first: torch.Tensor, second: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("first", first)
        self.register_buffer("second", second)


def _views(kind: str) -> Halves:
    memory = torch.arange(24.0)
    match kind:
        case "apart":
            return Halves(torch.full((8,), 7.0), torch.full((8,), 8.0))
        case "overlapping":
            return Halves(memory[:8], memory[4:12])
        case "overlapping elsewhere":
            return Halves(memory[:8], memory[5:13])
        case "side by side":
            return Halves(memory[:8], memory[8:16])
        case "between each other":
            return Halves(memory[:16:2], memory[1:17:2])
        case _:
            return Halves(memory[:16:2], memory[4:20:2])


@pytest.mark.parametrize(
    ("saved", "live"),
    [
        ("apart", "overlapping"),
        ("side by side", "overlapping"),
        ("overlapping", "overlapping elsewhere"),
        ("apart", "overlapping with steps"),
        ("between each other", "overlapping with steps"),
    ],
)
def test_live_entries_that_overlap_otherwise_than_saved_are_refused(saved: str, live: str, tmp_path: Path) -> None:
    """Two saved values for one live memory cannot both be restored: a mismatch before anything changed."""
    with Checkpointer(tmp_path / "chain", {"model": _views(saved)}, rng=False) as ckpt:
        ckpt.save()
    model = _views(live)
    before = fingerprint(model.state_dict())
    with Checkpointer(tmp_path / "chain", {"model": model}, rng=False) as ckpt:
        with pytest.raises(TargetMismatchError, match=r"model\.second: shares its memory"):
            ckpt.restore()
        assert fingerprint(model.state_dict()) == before
        progress = ckpt.restore(strict=False)
    assert progress is not None
    assert any("model.second: shares its memory" in text for text in progress.mismatches)
    assert fingerprint(model.first) == fingerprint(_views(saved).first)


@pytest.mark.parametrize(
    ("saved", "live"),
    [
        ("overlapping", "overlapping"),
        ("overlapping with steps", "overlapping with steps"),
        ("overlapping", "apart"),
        ("apart", "side by side"),
        ("apart", "between each other"),
        ("side by side", "between each other"),
    ],
)
def test_live_entries_that_share_as_saved_or_not_at_all_are_restored(saved: str, live: str, tmp_path: Path) -> None:
    """Views that lie as they were saved, or beside each other, get exactly what was saved."""
    with Checkpointer(tmp_path / "chain", {"model": _views(saved)}, rng=False) as ckpt:
        ckpt.save()
    model = _views(live)
    for buffer in model.buffers():
        buffer.fill_(99)
    with Checkpointer(tmp_path / "chain", {"model": model}, rng=False) as ckpt:
        progress = ckpt.restore()
    assert progress is not None
    assert progress.mismatches == ()
    expected = _views(saved)
    for name, buffer in expected.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), name


# --- what cannot be known, allocated or keyed -------------------------------------------------------------------------


@pytest.mark.parametrize("long", [False, True])
def test_an_enum_that_is_not_loaded_is_found_before_models_change(
    long: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The NotFoundError comes before a bit of the model changed, also for an enum inside a long document."""
    module = types.ModuleType("ciuic_test_colours")
    Colour = enum.Enum("Colour", "RED", module=module.__name__)  # noqa: N806
    module.Colour = Colour  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    model = nn.Linear(4, 4)
    plain = {"colour": Colour["RED"], "log": list(range(50_000 if long else 1))}
    with Checkpointer(tmp_path / "chain", {"model": model, "plain": plain}) as ckpt:
        ckpt.save()
        monkeypatch.delitem(sys.modules, module.__name__)
        model.weight.data.zero_()
        before = fingerprint(model.state_dict())
        with pytest.raises(NotFoundError) as unknown:
            ckpt.restore()
    assert unknown.value.kind == "enum_not_loaded"
    assert fingerprint(model.state_dict()) == before


def _resolved(path: Path, state: Any) -> tuple[SnapshotChain, Resolved]:
    ciuic_async.save(state, path)
    chain = SnapshotChain(path)
    latest = chain.latest()
    assert latest is not None
    return chain, latest.resolve()


def test_a_tensor_that_memory_cannot_hold_is_a_store_error(tmp_path: Path) -> None:
    """A manifest that claims an exabyte gets a typed error that names the tensor and the size."""
    chain, resolved = _resolved(tmp_path / "chain", {"w": torch.ones(4)})
    huge = replace(resolved.manifest.tensors[0], shape=(1 << 58,))
    lying = replace(resolved, manifest=replace(resolved.manifest, tensors=(huge,)))
    with pytest.raises(StoreError, match=rf"tensor w: cannot allocate its {1 << 60} bytes") as failure:
        load_tree(chain.store, lying)
    assert (failure.value.kind, failure.value.where) == ("out_of_memory", "w")
    chain.close()


@pytest.mark.parametrize("key", [[1], {"dict": []}])
def test_a_key_that_cannot_be_one_is_an_integrity_error(key: Any, tmp_path: Path) -> None:
    """A top-level key that Python cannot hash is a malformed node."""
    chain, resolved = _resolved(tmp_path / "chain", {"w": torch.ones(4)})
    trees = tuple(replace(tree, key=key) for tree in resolved.manifest.trees)
    lying = replace(resolved, manifest=replace(resolved.manifest, trees=trees))
    with pytest.raises(IntegrityError) as damage:
        load_tree(chain.store, lying)
    assert damage.value.kind == "malformed_node"
    chain.close()


# --- CUDA streams -----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_restoring_waits_for_training_on_a_side_stream(tmp_path: Path) -> None:
    """Work queued on another stream before restore() is done first, and work queued after sees what was restored."""
    weight = torch.ones(1 << 20, device="cuda")
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    work = torch.rand(4096, 4096, device="cuda")
    with Checkpointer(tmp_path / "chain", {"w": weight}, rng=False) as ckpt:
        ckpt.save().wait_durable(60)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            for _ in range(50):
                torch.mm(work, work, out=work).clamp_(-1, 1)
            weight.fill_(5)
            ckpt.restore()
            seen = weight.clone()
        torch.cuda.synchronize()
    assert seen.eq(1).all()
    assert weight.eq(1).all()


def test_memory_for_what_is_restored_is_not_filled_first() -> None:
    """Deterministic algorithms fill what ``torch.empty`` gives; all of this is written anyway."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert int(torch.empty(1 << 26, dtype=torch.uint8).min()) == 255
        fresh = empty((1 << 24,), torch.float32, "cpu")
    finally:
        torch.use_deterministic_algorithms(before)
    assert (fresh.shape, fresh.dtype) == ((1 << 24,), torch.float32)
    assert not bool(fresh.isnan().all())


def _trained(steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(steps)
    model = nn.Linear(200, 200)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(steps):
        model(torch.randn(3, 200)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_an_optimizer_that_has_state_keeps_its_memory(tmp_path: Path) -> None:
    """Moments are read to where they are; afterwards they are the saved ones, and training goes on alike."""
    model, optimizer = _trained(3)
    with Checkpointer(tmp_path / "chain", {"model": model, "optimizer": optimizer}) as ckpt:
        ckpt.save().wait_durable(60)
        expected = fingerprint(optimizer.state_dict())
    other_model, other = _trained(1)
    before = {name: value.data_ptr() for name, value in other.state[other_model.weight].items()}
    with Checkpointer(tmp_path / "chain", {"model": other_model, "optimizer": other}) as ckpt:
        ckpt.restore()
    after = {name: value.data_ptr() for name, value in other.state[other_model.weight].items()}
    assert after["exp_avg"] == before["exp_avg"]
    assert after["exp_avg_sq"] == before["exp_avg_sq"]
    assert fingerprint(other.state_dict()) == expected
    for one, opt in ((model, optimizer), (other_model, other)):
        torch.manual_seed(9)
        one(torch.randn(3, 200)).square().sum().backward()
        opt.step()
    assert fingerprint(other.state_dict()) == fingerprint(optimizer.state_dict())


@pytest.mark.parametrize("shared", ["with each other", "with a parameter", "with a larger one"])
def test_state_that_shares_its_memory_is_not_read_in_place(tmp_path: Path, shared: str) -> None:
    """What looks into memory that others use too gets memory of its own, and the others keep their values."""
    _, optimizer = _trained(2)
    with Checkpointer(tmp_path / "chain", {"optimizer": optimizer}, rng=False) as ckpt:
        ckpt.save().wait_durable(60)
        expected = fingerprint(optimizer.state_dict())
    other_model, other = _trained(1)
    state = other.state[other_model.weight]
    around = torch.zeros(3, 200, 200)
    if shared == "with each other":
        state["exp_avg_sq"] = state["exp_avg"]
    elif shared == "with a parameter":
        state["exp_avg"] = other_model.weight.detach()
    else:
        state["exp_avg"] = around[1]
    weight = other_model.weight.detach().clone()
    with Checkpointer(tmp_path / "chain", {"optimizer": other}, rng=False) as ckpt:
        ckpt.restore()
    assert fingerprint(other.state_dict()) == expected
    assert torch.equal(other_model.weight, weight)
    assert not around.any()
