"""Plain files in and out: what others read, what comes back bit for bit, and files that mean harm."""

from __future__ import annotations

import base64
import collections
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import threading
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import ciuic_async
from ciuic_async import Checkpointer, SnapshotChain
from ciuic_async.cli.main import main
from ciuic_async.errors import CiuicError, CiuicWarning, IntegrityError, NotFoundError, StoreError, UsageError
from ciuic_async.interchange import files, hdf5_read, limits, usual
from ciuic_async.interchange.torch_file import read_torch_file
from tests.strategies import State, fingerprint, trees

FORMATS = (".pt", ".pth", ".safetensors", ".h5", ".hdf5")
own_folder = settings(
    max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def training(steps: int = 3) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A small model that has been trained a little."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 1))
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).pow(2).mean().backward()
        optimizer.step()
    return model, optimizer


def plain_checkpoint(steps: int = 3) -> dict[str, Any]:
    """What most programs give to torch.save."""
    model, optimizer = training(steps)
    return {
        "epoch": 2,
        "step": steps,
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "loss": 0.25,
    }


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Any, str]:
    """Exit code, data and stderr of a command with ``--json``."""
    capsys.readouterr()
    code = main([*map(str, arguments), "--json"])
    out = capsys.readouterr()
    return code, json.loads(out.out) if out.out.strip() else None, out.err


def read_bytes(data: bytes, load_data: bool = True) -> Any:
    """A ``.pt`` file's bytes, read."""
    return read_torch_file(io.BytesIO(data), "file.pt", len(data), load_data)


def torch_bytes(value: Any, **options: Any) -> bytes:
    """What torch.save writes."""
    out = io.BytesIO()
    torch.save(value, out, **options)
    return out.getvalue()


# --- export -----------------------------------------------------------------------------------------------------------


def test_a_pt_export_is_a_usual_checkpoint(tmp_path: Path) -> None:
    """``torch.load(weights_only=True)`` gives epoch, loss and state dicts under their usual names, bit for bit."""
    model, optimizer = training()
    with Checkpointer(tmp_path / "chain", {"model": model, "optimizer": optimizer, "note": "x"}) as ckpt:
        ckpt.step(epoch=3, batch=7)
        snapshot = ckpt.save(metrics={"loss": 0.1}).wait_durable()
        path = snapshot.export(tmp_path / "out.pt")
    for options in ({}, {"mmap": True}):
        loaded = torch.load(path, weights_only=True, **options)
        assert list(loaded) == ["epoch", "batch", "step", "loss", "model_state_dict", "optimizer_state_dict", "note"]
        assert (loaded["epoch"], loaded["batch"], loaded["step"], loaded["loss"]) == (3, 7, 1, 0.1)
        assert fingerprint(loaded["model_state_dict"]) == fingerprint(model.state_dict())
        assert fingerprint(loaded["optimizer_state_dict"]) == fingerprint(optimizer.state_dict())
    fresh, fresh_optimizer = training(0)
    fresh.load_state_dict(loaded["model_state_dict"])
    fresh_optimizer.load_state_dict(loaded["optimizer_state_dict"])
    assert fingerprint(fresh.state_dict()) == fingerprint(model.state_dict())


def test_storages_in_a_pt_export_are_aligned_and_shared(tmp_path: Path) -> None:
    """Each storage is once in the file, at a multiple of 64 bytes, and views of it are views again."""
    base = torch.arange(100.0)
    snapshot = ciuic_async.save(
        {"a": base, "b": base[10:20], "c": torch.ones(3, dtype=torch.uint8)}, tmp_path / "chain"
    )
    path = snapshot.export(tmp_path / "out.pt")
    with zipfile.ZipFile(path) as zipped, path.open("rb") as file:
        infos = [info for info in zipped.infolist() if "/data/" in info.filename]
        assert sorted(info.file_size for info in infos) == [3, 400]
        for info in infos:
            file.seek(info.header_offset + 26)
            name_bytes, extra_bytes = struct.unpack("<HH", file.read(4))
            assert (info.header_offset + 30 + name_bytes + extra_bytes) % 64 == 0
    loaded = torch.load(path, weights_only=True)
    loaded["a"][10] = -1.0
    assert loaded["b"][0] == -1.0


@settings(own_folder)
@given(state=trees())
def test_whatever_a_pt_export_holds_torch_loads_without_trust(state: State, tmp_path: Path) -> None:
    """A tree of any values becomes a file that weights_only loading takes; tensors and plain values keep their bits."""
    path = tmp_path / "out.pt"
    try:
        changed = files.write({"state": state.value}, path, {})
    except UsageError as refused:  # an enum's name is a key beside the enum
        changed = {refused.kind: 1}
        assume("duplicate_name" not in changed)
    loaded = torch.load(path, weights_only=True)["state"]
    own = files.read(path).state["state"]
    assert fingerprint(own) == fingerprint(loaded)
    if not changed:
        assert fingerprint(loaded) == fingerprint(state.value)


def test_what_pt_cannot_hold_is_told(tmp_path: Path) -> None:
    """A numpy array becomes a tensor and a deque a list, and a warning says so; .h5 holds both as they are."""
    state = {"array": np.arange(3), "last": collections.deque([1.0])}
    snapshot = ciuic_async.save(state, tmp_path / "chain")
    with pytest.warns(CiuicWarning, match=r"deque as list \(1 times\), ndarray as torch.Tensor \(1 times\)"):
        snapshot.export(tmp_path / "out.pt")
    assert torch.equal(torch.load(tmp_path / "out.pt", weights_only=True)["array"], torch.arange(3))
    snapshot.export(tmp_path / "out.h5")
    assert fingerprint(files.read(tmp_path / "out.h5").state) == fingerprint(state)


@settings(own_folder, max_examples=6)
@given(state=trees())
def test_hdf5_holds_every_tree_bit_for_bit(state: State, tmp_path: Path) -> None:
    """Types, order, keys and bits of any state tree come back from .h5; its structure alone reads too."""
    path = tmp_path / "out.h5"
    files.write(state.value, path, {})
    assert fingerprint(files.read(path).state) == fingerprint(state.value)
    assert type(files.read(path, load_data=False).state) is type(state.value)


@settings(own_folder, max_examples=3)
@given(state=st.dictionaries(st.one_of(st.text(max_size=3), st.integers(0, 3), st.booleans()), trees(), max_size=3))
def test_hdf5_holds_dicts_whatever_their_keys(state: dict[Any, State], tmp_path: Path) -> None:
    """Keys with slashes, dots, NUL, or that read alike (1 and "1") stay apart, in order."""
    values = {key: tree.value for key, tree in state.items()}
    values |= {"1": torch.ones(1), 1: torch.zeros(1), "a/b": {"..": torch.ones(2)}, "": {".": torch.ones(3)}, "\0": 1}
    path = tmp_path / "out.h5"
    files.write(values, path, {})
    assert fingerprint(files.read(path).state) == fingerprint(values)


def test_hdf5_is_readable_for_others(tmp_path: Path) -> None:
    """Groups follow the tree, tensors are datasets, plain values attributes; ties are one dataset; bf16 says so."""
    weight = torch.arange(6.0).reshape(2, 3)
    state = {
        "model": collections.OrderedDict(weight=weight, tied=weight, half=torch.ones(2, dtype=torch.bfloat16)),
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "lr": 0.5},
        "note": "hello",
        "epoch": 4,
    }
    path = ciuic_async.save(state, tmp_path / "chain").export(tmp_path / "out.h5")
    with h5py.File(path) as file:
        assert np.array_equal(file["model/weight"][()], weight.numpy())
        assert file["model/weight"] == file["model/tied"]
        assert file["model/half"].attrs["ciuic.dtype"] == "bfloat16"
        assert file["model/half"][()].tolist() == [0x3F80, 0x3F80]
        assert file["optimizer/state/0/step"][()] == 3.0
        assert (file["optimizer"].attrs["lr"], file.attrs["note"], file.attrs["epoch"]) == (0.5, "hello", 4)
        assert list(file["model"]) == ["weight", "tied", "half"]
    loaded = files.read(path).state
    assert loaded["model"]["tied"].data_ptr() == loaded["model"]["weight"].data_ptr()


@pytest.mark.parametrize("suffix", FORMATS)
def test_an_export_replaces_only_when_told(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that is there stays, exit code 2, unless --force is given; no temporary file is left."""
    ciuic_async.save({"w": torch.ones(2)}, tmp_path / "chain")
    out = tmp_path / "out"
    out.mkdir()
    path = out / f"model{suffix}"
    path.write_bytes(b"precious")
    code, _, err = run(capsys, "export", tmp_path / "chain", "latest", path)
    assert code == 2
    assert "--force" in err
    assert path.read_bytes() == b"precious"
    assert run(capsys, "export", tmp_path / "chain", "latest", path, "--force")[0] == 0
    assert torch.equal(files.read(path).state["w"], torch.ones(2))
    assert [item.name for item in out.iterdir()] == [path.name]


def test_a_file_that_comes_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between looking and naming the new file nothing is replaced either."""
    path = tmp_path / "x.safetensors"
    real_link = os.link

    def link(source: Path, target: Path) -> None:
        Path(target).write_bytes(b"other")
        real_link(source, target)

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(UsageError) as caught:
        files.write({"w": torch.ones(2)}, path, {}, overwrite=False)
    assert caught.value.kind == "file_exists"
    assert path.read_bytes() == b"other"
    assert [item.name for item in tmp_path.iterdir() if "x.safe" in item.name] == ["x.safetensors"]


@pytest.mark.parametrize("suffix", FORMATS)
def test_an_export_that_fails_leaves_nothing(suffix: str, tmp_path: Path) -> None:
    """No folder, or a folder in its place: a StoreError with the place, and no temporary file."""
    place = tmp_path / f"folder{suffix}"
    place.mkdir()
    for path in (place, tmp_path / "nowhere" / f"out{suffix}"):
        with pytest.raises(StoreError) as caught:
            files.write({"w": torch.ones(2)}, path, {})
        assert (caught.value.kind, caught.value.where) == ("export_failed", str(path))
    assert [item.name for item in tmp_path.iterdir() if item.name.startswith(".")] == []


@pytest.mark.damages
def test_a_folder_that_is_missing_is_named_before_anything_is_read(tmp_path: Path) -> None:
    """Nobody waits for gigabytes to hear of a misspelt folder: the error comes without the state's bytes."""
    snapshot = ciuic_async.save({"w": torch.ones(2)}, tmp_path / "chain")
    for segment in (tmp_path / "chain" / "segments").rglob("*"):
        if segment.is_file():
            segment.unlink()
    for folder, reason in (("nowhere", "there is no such folder"), ("chain/ciuic.json", "is no folder")):
        path = tmp_path / folder / "out.pt"
        with pytest.raises(StoreError) as caught:
            snapshot.export(path)
        assert (caught.value.kind, caught.value.where) == ("export_failed", str(path))
        assert f"{path.parent}: {reason}" in str(caught.value)


# --- import -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_torch_saves_is_read_bit_for_bit(protocol: int) -> None:
    """State dicts, all element types, views, numpy values and containers of collections, in every pickle protocol."""
    base = torch.randn(4, 5)
    state = {
        **plain_checkpoint(),
        "dtypes": [torch.ones(3).to(dtype) for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool)],
        "new": torch.ones(2, dtype=torch.uint16),
        "complex": torch.ones(2, dtype=torch.complex64).conj(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "views": [base, base.t(), base[1:, ::2], base.view(-1)],
        "numpy": (
            np.float64(0.5),
            np.arange(4, dtype=">i4"),
            np.asfortranarray(np.ones((2, 3))),
            np.array(["a", "bc"]),
        ),
        "times": np.datetime64(3, "s"),
        "random": ("MT19937", np.arange(4, dtype=np.uint32), 624, 0, 0.0),
        "plain": [None, True, 1.5, -(2**70), 1 + 2j, b"\x00\xff", bytearray(b"x"), "é\ud800", {1, 2}, frozenset({3})],
        "others": [collections.deque([1], 3), collections.defaultdict(list, a=[1]), range(3), slice(1, 2, None)],
        "torch": [torch.Size([1, 2]), torch.float32, torch.device("cuda:1"), torch.device("cpu"), torch.strided],
        "keys": {1: "a", (1, "x"): "b", 1.5: "c", None: "d"},
    }
    got = read_bytes(torch_bytes(state, pickle_protocol=protocol))
    assert fingerprint(got) == fingerprint(state)
    assert got["views"][1].untyped_storage().data_ptr() == got["views"][0].untyped_storage().data_ptr()
    assert read_bytes(torch_bytes(state, pickle_protocol=protocol), load_data=False)["new"].is_meta


def write_plain(folder: Path, suffix: str, step: int) -> Path:
    """A checkpoint of a training's step in one of the formats, made by others where they can."""
    path = folder / f"ckpt-{step}{suffix}"
    state = plain_checkpoint(step)
    if suffix == ".safetensors":
        save_file(dict(state["model_state_dict"]), path, {"step": str(step), "format": "pt", "author": "x"})
    elif suffix in (".pt", ".pth"):
        torch.save(state, path)
    else:
        with h5py.File(path, "w", track_order=True) as file:
            group = file.create_group("model_state_dict", track_order=True)
            for name, tensor in state["model_state_dict"].items():
                group[name] = tensor.numpy()
            file["step"], file["loss"] = step, 0.25
            file.attrs["author"] = "x"
    return path


@pytest.mark.parametrize("suffix", FORMATS)
def test_an_export_of_an_import_equals_the_file(
    suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file's content goes into the chain and comes out again as it was: names, order, bits, and no more."""
    path = write_plain(tmp_path, suffix, 4)
    code, found, _ = run(capsys, "import", tmp_path / "chain", path)
    assert code == 0
    assert (found[0]["step"], found[0]["outcome"]) == (4, "imported")
    assert run(capsys, "export", tmp_path / "chain", "step:4", tmp_path / f"out{suffix}")[0] == 0
    assert fingerprint(files.read(tmp_path / f"out{suffix}").state) == fingerprint(files.read(path).state)
    if suffix == ".pt":
        assert fingerprint(torch.load(tmp_path / "out.pt", weights_only=True)) == fingerprint(plain_checkpoint(4))


def test_a_folder_is_imported_in_the_order_of_the_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ten files become ten snapshots by step, not by name; epoch, metrics and origin are recorded; again: nothing."""
    folder = tmp_path / "files"
    folder.mkdir()
    for step in (10, 9, 2):
        write_plain(folder, ".pt", step)
    (folder / "notes.txt").write_text("no checkpoint")
    chain = tmp_path / "chain"
    code, found, _ = run(capsys, "import", chain, folder, "--dry-run")
    assert (code, [item["outcome"] for item in found]) == (0, ["new"] * 3)
    assert not chain.exists()
    code, found, _ = run(capsys, "import", chain, folder, "--tag", "old")
    assert (code, [item["step"] for item in found]) == (0, [2, 9, 10])
    with SnapshotChain(chain, create=False) as opened:
        snapshots = list(opened)
        assert [snapshot.step for snapshot in snapshots] == [2, 9, 10]
        assert snapshots[2].parent == snapshots[1].id
        assert [(s.epoch, s.metrics["loss"], s.tags) for s in snapshots[-1:]] == [(2, 0.25, ("old",))]
        assert snapshots[0].config is not None
        assert snapshots[0].config["imported"]["name"] == "ckpt-2.pt"
    (folder / "ckpt-2.pt").rename(folder / "other.pt")
    write_plain(folder, ".pt", 12)
    code, found, _ = run(capsys, "import", chain, folder)
    assert [(item["step"], item["outcome"]) for item in found] == [
        (2, "known"),
        (9, "known"),
        (10, "known"),
        (12, "imported"),
    ]
    with SnapshotChain(chain, create=False) as opened:
        assert len(opened) == 4


def test_what_did_not_change_is_stored_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A large frozen tensor in every file costs its bytes once; two names of one content are one snapshot."""
    frozen = torch.randn(1 << 20)
    for number in range(4):
        torch.save(
            {"trunk": frozen, "head": torch.full((100,), float(number)), "epoch": number}, tmp_path / f"{number}.pt"
        )
    (tmp_path / "copy.pt").write_bytes((tmp_path / "3.pt").read_bytes())
    code, found, _ = run(capsys, "import", tmp_path / "chain", *sorted(tmp_path.glob("*.pt")))
    assert code == 0
    assert [item["outcome"] for item in found].count("same") == 1
    assert len({item["snapshot"] for item in found}) == 4
    stored = sum(path.stat().st_size for path in (tmp_path / "chain").rglob("*.seg"))
    assert stored < 1.2 * frozen.nbytes


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (["ckpt_epoch_10.pt", "ckpt_epoch_9.pt"], ["ckpt_epoch_9.pt", "ckpt_epoch_10.pt"]),
        (["m-step=200.pt", "m-step=30.pt"], ["m-step=30.pt", "m-step=200.pt"]),
        (["w10.pt", "w9.pt", "best.pt"], ["best.pt", "w9.pt", "w10.pt"]),
    ],
)
def test_names_give_the_order_where_nothing_else_does(names: list[str], order: list[str]) -> None:
    """Steps and epochs in names count as numbers; names without either sort as people count."""
    found = {Path(name): usual.facts({}, Path(name)) for name in names}
    assert [path.name for path in usual.ordered(found)] == order


def test_facts_come_from_the_usual_keys() -> None:
    """Numbers, tensors and numpy numbers of one element count; texts, infinities and nonsense do not."""
    state = {
        "global_step": torch.tensor(7),
        "epoch": np.int64(3),
        "loss": torch.tensor(0.5),
        "val_loss": float("inf"),
        "acc": "high",
        "metrics": {"f1": 0.75, "name": "x", 3: 1.0},
        "lr": True,
    }
    found = usual.facts(state, Path("x.pt"))
    assert (found.step, found.epoch, found.batch) == (7, 3, None)
    assert found.metrics == {"loss": 0.5, "f1": 0.75}
    assert usual.facts([1], Path("x.pt")) == usual.Facts()
    assert usual.facts({"step": -1, "epoch": 2**80}, Path("x.pt")) == usual.Facts()


# --- files that mean harm ---------------------------------------------------------------------------------------------


class Harm:
    """Unpickled the usual way it makes a file."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


@pytest.mark.parametrize("protocol", [2, 4])
def test_nothing_in_a_file_is_run(protocol: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A pickle that would run a command is refused by name, exit code 4; the command did not run; no chain is made."""
    proof = tmp_path / "proof"
    for number, harm in enumerate((Harm(os.system, f"touch {proof}"), Harm(eval, f"open({str(proof)!r},'w')"))):
        path = tmp_path / f"bad{number}.pt"
        torch.save({"epoch": 1, "model": harm}, path, pickle_protocol=protocol)
        code, found, err = run(capsys, "import", tmp_path / "chain", path)
        assert code == 4
        assert ("system" if number == 0 else "eval") in err
        assert found[0]["error"]["kind"] == "file_refused"
    assert not proof.exists()
    assert not (tmp_path / "chain").exists()


def test_a_bad_file_stops_all_or_is_skipped_when_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is imported beside a bad file, unless --skip-bad: then the others are, and the exit code tells."""
    good, bad = write_plain(tmp_path, ".pt", 2), tmp_path / "bad.pt"
    torch.save({"args": Harm(print, "x")}, bad)
    chain = tmp_path / "chain"
    assert run(capsys, "import", chain, good, bad)[0] == 4
    assert not chain.exists()
    code, found, _ = run(capsys, "import", chain, good, bad, "--skip-bad")
    assert (code, [item["outcome"] for item in found]) == (4, ["imported", "refused"])
    with SnapshotChain(chain, create=False) as opened:
        assert len(opened) == 1


def zip_file(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A zip of these members."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as zipped:
        for name, data in members.items():
            zipped.writestr(name, data)
    return out.getvalue()


def storage_pickle(count: int, size: tuple[int, ...], stride: tuple[int, ...], kind: str = "FloatStorage") -> bytes:
    """The pickle of one tensor in storage 0, written by hand."""

    def number(value: int) -> bytes:
        data = value.to_bytes(9, "little", signed=True)
        return b"\x8a\x09" + data

    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    stored = b"(X\x07\x00\x00\x00storagectorch\n" + kind.encode() + b"\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
    head = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n("
    return head + stored + number(count) + b"tQ" + number(0) + numbers(size) + numbers(stride) + b"\x89NtR."


def laughs(levels: int) -> bytes:
    """A pickle of a few bytes whose lists hold each other twice, level by level."""
    return (
        b"\x80\x02]q\x00"
        + b"".join(b"](h" + bytes([n]) + b"h" + bytes([n]) + b"eq" + bytes([n + 1]) for n in range(levels))
        + b"."
    )


FLOATS = bytes(16)
HOSTILE: dict[str, tuple[bytes, str]] = {
    "no zip": (b"hello", "file_malformed"),
    "empty": (b"", "file_malformed"),
    "zip of nothing": (zip_file({"x": b""}), "file_malformed"),
    "two roots": (zip_file({"a/data.pkl": b"N.", "b/data.pkl": b"N."}), "file_malformed"),
    "compressed": (zip_file({"a/data.pkl": b"\x80\x02N."}, zipfile.ZIP_DEFLATED), "file_malformed"),
    "bomb": (
        zip_file({"a/data.pkl": storage_pickle(1 << 24, (1 << 24,), (1,)), "a/data/0": bytes(1 << 26)}, 8),
        "file_malformed",
    ),
    "script": (zip_file({"a/data.pkl": b"N.", "a/constants.pkl": b"N."}), "file_refused"),
    "path as key": (zip_file({"a/data.pkl": storage_pickle(4, (4,), (1,)), "a/../data/0": FLOATS}), "file_malformed"),
    "short storage": (zip_file({"a/data.pkl": storage_pickle(4, (4,), (1,)), "a/data/0": b"1"}), "file_malformed"),
    "outside": (zip_file({"a/data.pkl": storage_pickle(4, (5,), (1,)), "a/data/0": FLOATS}), "file_malformed"),
    "huge": (zip_file({"a/data.pkl": storage_pickle(4, (1 << 61,), (1,)), "a/data/0": FLOATS}), "file_malformed"),
    "negative": (zip_file({"a/data.pkl": storage_pickle(4, (-1,), (1,)), "a/data/0": FLOATS}), "file_malformed"),
    "expanded": (zip_file({"a/data.pkl": storage_pickle(4, (1 << 40,), (0,)), "a/data/0": FLOATS}), "file_bomb"),
    "odd storage": (
        zip_file({"a/data.pkl": storage_pickle(4, (4,), (1,), "nn.Module"), "a/data/0": FLOATS}),
        "file_refused",
    ),
    "laughs": (zip_file({"a/data.pkl": laughs(60)}), "file_malformed"),
    "itself": (zip_file({"a/data.pkl": b"\x80\x02]q\x00h\x00a."}), "file_malformed"),
    "deep": (zip_file({"a/data.pkl": b"\x80\x02" + b"]" * 30_000 + b"a" * 29_999 + b"."}), "file_malformed"),
    "deep key": (zip_file({"a/data.pkl": b"\x80\x02})" + b"\x85" * 30_000 + b"Ns."}), "file_malformed"),
    "unending": (zip_file({"a/data.pkl": b"\x80\x02]"}), "file_malformed"),
    "no value": (zip_file({"a/data.pkl": b"\x80\x02."}), "file_malformed"),
    "mark": (zip_file({"a/data.pkl": b"\x80\x02(."}), "file_malformed"),
    "name alone": (zip_file({"a/data.pkl": b"\x80\x02cos\nsystem\n."}), "file_refused"),
    "name in a tuple": (zip_file({"a/data.pkl": b"\x80\x02cos\nsystem\n\x85\x85]q\x00a."}), "file_malformed"),
    "object": (zip_file({"a/data.pkl": b"\x80\x02cargparse\nNamespace\n)\x81."}), "file_refused"),
    "attributes": (zip_file({"a/data.pkl": b"\x80\x02}}b."}), "file_refused"),
    "protocol 0": (zip_file({"a/data.pkl": b"(I1\n."}), "file_malformed"),
    "long": (zip_file({"a/data.pkl": b"\x80\x02\x8b\xff\xff\xff\x7f" + bytes(100) + b"."}), "file_malformed"),
    "memory": (zip_file({"a/data.pkl": b"\x80\x02h\x00."}), "file_malformed"),
    "extension": (zip_file({"a/data.pkl": b"\x80\x02\x82\x01."}), "file_malformed"),
    "text hash": (zip_file({"a/data.pkl": b"\x80\x02}]Ns."}), "file_malformed"),
    "big-endian": (zip_file({"a/data.pkl": b"N.", "a/byteorder": b"big"}), "file_unsupported"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_pt_files_are_refused(case: str) -> None:
    """Each is a typed error of its kind, whether data is wanted or the structure alone, and takes next to nothing."""
    data, kind = HOSTILE[case]
    for load_data in (True, False):
        with pytest.raises(CiuicError) as caught:
            read_bytes(data, load_data)
        assert caught.value.kind == kind, str(caught.value)
        assert caught.value.where == "file.pt"


def test_copies_that_a_pickle_asks_for_again_and_again_are_counted() -> None:
    """A hundred thousand copies of a large list, a few bytes each, end at the allowance."""
    items = b"(" + b"N" * 1_000_000 + b"e"
    again = b"c__builtin__\nlist\nh\x00\x85R0" * 100_000
    with pytest.raises(IntegrityError) as caught:
        read_bytes(zip_file({"a/data.pkl": b"\x80\x02]q\x00" + items + again + b"."}))
    assert caught.value.kind == "file_bomb"


def test_members_that_overlap_give_no_more_than_the_file_has() -> None:
    """A directory that names the same bytes under many names is refused when they add up to more than the file."""
    out = io.BytesIO()
    keys = [str(number) for number in range(50)]
    body = b"\x80\x02]("
    for key in keys:
        part = storage_pickle(4096, (4096,), (1,))[2:-1]
        body += part.replace(b"X\x01\x00\x00\x000", b"X" + len(key).to_bytes(4, "little") + key.encode())
    with zipfile.ZipFile(out, "w") as zipped:
        zipped.writestr("a/data.pkl", body + b"e.")
        zipped.writestr("a/data/0", bytes(16384))
        first = zipped.getinfo("a/data/0")
        for key in keys[1:]:
            info = zipfile.ZipInfo(f"a/data/{key}")
            info.file_size = info.compress_size = first.file_size
            info.CRC, info.header_offset = first.CRC, first.header_offset
            zipped.filelist.append(info)
            zipped.NameToInfo[info.filename] = info
    with pytest.raises(IntegrityError, match="longer than the file"):
        read_bytes(out.getvalue(), load_data=False)


def test_a_flipped_bit_in_a_pt_file_is_found() -> None:
    """The zip's own checksum covers the tensors; a changed byte is an error and no other number."""
    data = bytearray(torch_bytes({"w": torch.arange(1000.0)}))
    data[data.index(struct.pack("<f", 500.0))] ^= 1
    with pytest.raises(IntegrityError) as caught:
        read_bytes(bytes(data))
    assert caught.value.kind == "file_malformed"


@settings(own_folder, max_examples=60)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
def test_a_damaged_pt_file_never_crashes_the_reader(place: float, bit: int, cut: bool) -> None:
    """Wherever a bit flips or the file ends: what is read is a state, or the error is typed."""
    data = bytearray(_DAMAGED)
    position = int(place * len(data))
    data[position] ^= 1 << bit
    whole = bytes(data[:position] if cut else data)
    try:
        kind = type(read_bytes(whole)).__name__
    except CiuicError as error:
        kind = error.kind
    assert kind in ("dict", "OrderedDict", "file_malformed", "file_refused", "file_bomb", "file_unsupported")


_DAMAGED = torch_bytes({"w": torch.arange(40.0), "n": np.arange(3), "o": collections.OrderedDict(a=(1, 2.0))})


def test_the_format_before_torch_1_6_says_what_to_do() -> None:
    """A file of the old format is no damage: the error says how to convert it."""
    data = torch_bytes({"w": torch.ones(2)}, _use_new_zipfile_serialization=False)
    with pytest.raises(UsageError, match="save it again") as caught:
        read_bytes(data)
    assert caught.value.kind == "file_unsupported"


def safetensors_bytes(header: bytes, data: bytes, claimed: int | None = None) -> bytes:
    """A file with this header, and the length that it claims."""
    return (len(header) if claimed is None else claimed).to_bytes(8, "little") + header + data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"1234567",
        safetensors_bytes(b"{}", b"", claimed=2**60),
        safetensors_bytes(b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4]}}', bytes(4)),
        safetensors_bytes(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,400]}}', bytes(4)),
        safetensors_bytes(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}', bytes(4)),
        safetensors_bytes(b'{"a":{"dtype":"P9","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
        safetensors_bytes(b"[" * 100_000, b""),
        safetensors_bytes(b'{"__metadata__":{"ciuic.values":"{"}}', b""),
        safetensors_bytes(b'{"__metadata__":{"ciuic.values":"[1]"}}', b""),
    ],
    ids=["empty", "short", "length", "shape", "end", "backwards", "dtype", "deep", "values", "list"],
)
def test_safetensors_headers_that_lie_are_refused(data: bytes, tmp_path: Path) -> None:
    """A header that claims what is not there is a typed error, and nothing is allocated for it."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(IntegrityError) as caught:
        files.read(path)
    assert caught.value.kind == "file_malformed"


def _soft(file: h5py.File) -> None:
    file["x"] = h5py.SoftLink("/y")


def _loop(file: h5py.File) -> None:
    file.create_group("a")["b"] = file["/"]


def _external(file: h5py.File) -> None:
    file["x"] = h5py.ExternalLink("secret.h5", "/secret")


def _virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource("secret.h5", "secret", (4,))
    file.create_virtual_dataset("x", layout)


def _outside(file: h5py.File) -> None:
    file.create_dataset("x", (4,), "f4", external=[("/etc/passwd", 0, 16)])


def _claims(file: h5py.File) -> None:
    file.create_dataset("x", (1 << 45,), "f4")  # nothing is stored: only the claim


def _chunk(file: h5py.File) -> None:
    file.create_dataset("x", (1 << 29,), "f8", chunks=(1 << 28,), compression="gzip")


def _bomb(file: h5py.File) -> None:
    file.create_dataset("x", (1 << 34,), "u1", chunks=(1 << 20,), compression="gzip")[: 1 << 20] = 0


def _plugin(file: h5py.File) -> None:
    file.create_dataset("x", (100,), "f4", chunks=(100,), compression="lzf")[:] = 0


def _reference(file: h5py.File) -> None:
    file.create_dataset("x", (1,), h5py.ref_dtype)


def _texts(file: h5py.File) -> None:
    file.create_dataset("x", (100,), h5py.string_dtype())


def _type(file: h5py.File) -> None:
    file["x"] = np.dtype("f4")


def _own_lie(file: h5py.File) -> None:
    file.attrs["ciuic.format"] = 1
    file["ciuic.tree"] = np.frombuffer(b'{"datasets":["/../x"],"format":1,"top":"single","trees":[]}', "u1")


def _own_newer(file: h5py.File) -> None:
    file.attrs["ciuic.format"] = 1
    file["ciuic.tree"] = np.frombuffer(b'{"format":2}', "u1")


def _own_soft(file: h5py.File) -> None:
    file.attrs["ciuic.format"] = 1
    file["x"] = h5py.ExternalLink("secret.h5", "/secret")
    tree = b'{"datasets":["/x"],"format":1,"top":"single","trees":[{"key":null,"node":{"tensor":0}}]}'
    file["ciuic.tree"] = np.frombuffer(tree, "u1")


def _own_copies(file: h5py.File) -> None:
    file.attrs["ciuic.format"] = 1
    file["x"] = np.zeros(1 << 20, "u1")
    node = ",".join(['{"bytes":0}'] * 20_000)
    tree = '{"datasets":["/x"],"format":1,"top":"single","trees":[{"key":null,"node":[' + node + "]}]}"
    file["ciuic.tree"] = np.frombuffer(tree.encode(), "u1")


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (_soft, "file_refused"),
        (_loop, "file_malformed"),
        (_external, "file_refused"),
        (_virtual, "file_refused"),
        (_outside, "file_refused"),
        (_claims, "file_bomb"),
        (_chunk, "file_malformed"),
        (_bomb, "file_bomb"),
        (_plugin, "file_refused"),
        (_reference, "file_unsupported"),
        (_texts, "file_unsupported"),
        (_type, "file_unsupported"),
        (_own_lie, "file_malformed"),
        (_own_newer, "file_unsupported"),
        (_own_soft, "file_refused"),
        (_own_copies, "file_bomb"),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else "",
)
def test_hostile_hdf5_files_are_refused(make: Callable[[h5py.File], None], kind: str, tmp_path: Path) -> None:
    """Links, virtual and external data, plugins, claims and bombs: a typed error before anything is read or taken."""
    with h5py.File(tmp_path / "secret.h5", "w") as secret:
        secret["secret"] = np.full(4, 42.0, "f4")
    path = tmp_path / "x.h5"
    with h5py.File(path, "w", libver="latest") as file:
        make(file)
    before = _peak_bytes()
    with pytest.raises(CiuicError) as caught:
        files.read(path)
    assert caught.value.kind == kind, str(caught.value)
    assert "42" not in str(caught.value)
    assert _peak_bytes() - before < 600 << 20


# An ordinary file in which a few bytes were changed, zlib, base64.
CRASHES = (
    "eNrtmW1MU1cYx8+5L+2l7yWIpVRelCgq65Q1pjDCLlDelMDVMVPRIAglFRsYUl3HMiyFQpwJdiFb+OC0zrhkH8ZcTIxZFlPGwH0wZksIW5bFgA"
    "kL2RKG2UuWLdHd9p5T24vywWWJm+f3obfP+d/znNPnnvvce56ernFUaVVmFYjCcYABBpDIA8SYNdnGegtYm4Yaxz5KM09tjFk0LXMrR0UBGNUV"
    "adFPyGA3sHUPlL5hBWKlZ/v6ZIXCivdFE/p6CPzLeH5rM0IxeNFZ4UENKJRj6ZI9jtob91VWirNbFQPsK5OVjhwgPIvUVJYJ0aMzvo4krtLJ5/"
    "XhdY77/cNxIVBIviC2pZUModSwhMbHR1rUo4ox5yW0VnlgUwPbA6SzYmtUp2gq5kANhJgNkU7FdAh63Sc6Ojyu+HqHqL3d1eFp9boATgI0ioR4"
    "rrfN7Tr+QiG+T6R50hTVppCa2pNvnx1PFI+X6xscMDYbCTVD1uaTEM13EKjA6kz3aMZ00nEPeHgxE+H00rEW2V/KrxvSi5FdAJP1c0gvQnZIps"
    "8hXUD2rzJdj27ICmQ7qWT9sEz/TKa/j/RyZOfI7utFWf8hmb7FmGxjnTwvCAQCgfBfxtfc1mJiLwGtzeDXaZXcXb3GQm1MLVTt3tZpbiruUwxX"
    "zWz+oOOH9Hf3z+26dvJ3nW50tL7+9m2rdWKiq2t5OSvr/Pnm5jt3Sktv3Ojvv38f8gaOKeMNGiaXN6iYVt6gY4x8BNiCc+JDeLgWXPjrGBp0k8"
    "5us0ROr7OkmtMtPn7rhhRmL2/QMjt5g5rp4Q16JkUIcWytENKwW4WQij0qhHRshjDPKwH4Lnh0Z+3Bc83YVb49z1ZgX/G3N/GTkdyci+HWzwNa"
    "pbXkD//ZCynsASGkZYuEkJp9XQjpWdYdNmjTcqFSfGt5p6D7w7PbN51BjrSW6yvz9KA/MFDBl5dNDbGZ7snnqcARmxBQ7P6azzDnV9Pr3JEB8b"
    "Xpl4nXiqoLL1vwFLh8k53JS7PVOa8sRILKbPfkxw76FXfYrJ0NDzTZhBHFjwOxjif2nvzo6hszh/GQSb0kH5oCS0nsMmwzF2++5bxyZGqU3mL9"
    "3rdyd0p/fPGnt3kaflUDbAtA5wVAY+5jTbPB1PhPsPcszAyuz+7f8SpXk+82Oe0+xpHXntZo89aNf9IyPbxhNtQdCHRQ4SBwT9OWJXG7c6n/uU"
    "hjWzV2UeK7t6CkR/xDgeGB4GA17yivKqusuDmUod7v+bZn/otgpuiCDeyiwu+BpRwQdeFcPrWo//PaLRyOx42trD90/d789Ej2bOjnPPAp5++i"
    "wkou6uHyzTcv1nrmdHgSa3cX12mq6GKS7kvxl1LhbFXURSc8deCbgyYrkG3XqPi2Bm+XxFffrGSNQCAQnimMqM7TizLlGMqQGlTHgWJ61Ii73W"
    "O4PsaBeP0pMcHixKqJt1MgTTyzF7VnQBgbyRDvwyX1ZxIScqxuJabotepjTEI/XK+Cj5hfvC5GSXWxeP0KdqKdfY4sIqGn8jqtjgcni79UH3xc"
    "nB/GAcji8JYxufKJGSc3B4FAIPyPqa5oqIMJ6R/Knqtel8+buElCf5cCt8vj6U7wE9GTWBIIBAKBQCAQCAQCgfC08jcNsHA5"
)
HANGS = (
    "eNrtmm1MW1UYx8+5L/TS9xLGSul42cjGNqwbNktBghcobxuBu4lLxxYGg5KONSCjzIqRlUIh04TVEA0f5ta5zMQP4sySZTFmKSLMD8uiCUFjzA"
    "JLMEQTZPElRpPN295zuvYifMBo1J3fB26f87/nOafPPfe59zz0XLW9UqM0KUEEjgMM0IN4HiHGLIk21pvB+tRX2w9R6nlqa9SiaZlbOUoKwIie"
    "lBr5CxnsBrYcgNInrECsdO/enKhQWPE8a0Qfj4G/GffPrQYoBi8yKzyoHoVyLE2yx1F7w6GKCnF2q2KAfWWw0pEDhCeR6opSIXJ0xNaRxHU68b"
    "w+vM5xv784LgRJki+IbWklQyg1LKHx8ZEW9YhiyH4OrVUeWFXA+gjprNga0SmaijpQASFqQ6RTUR2CHldve7vbGVvvELW3OdvdLR4nwEmARpEQ"
    "z/W0upynnynA94k0T5qiWpOkprbE22fPhuLxfF29HUZnI6FiyNrcCJF8B4FyVb7rXeP8Ma10PAAeX8x4OJ10rEH2Z/LrhvQiZOfDRP0C0guRHZ"
    "Tpc0gXkP2TTNehG7Ic2Q4qUT8u0z+W6e8gvQzZ2bL7elHWf0im7zAk2lgnzwsCgUAg/JfxNrU2G9krQGPV+7QaBXdfpzZTW1MKlPt3dZgai/qS"
    "hitntr/b/m3aW4fn9t0484tWOzpaV3f3rsUyMdHZubycmXnxYlPTvXslJbdu9fc/fAh5PceU8no1k8PrlUwLr9cyBj4MrIE58SE8XAMu/X4KDb"
    "pNa7Oaw+c2mVNMaWYvv3NLMnOQ12uYvbxexXTzeh2TLAQ5tkYIqtmdQlDJnhSCWjZdmOcVAHwdOLm35uiFJuwqz5Zrzbet+Noa+clwTvblUMsn"
    "fo3CUvyr7/ylZPaIENSwhUJQxb4sBHUs6wrpNak5UCG+tbyZ3/Xe+d3bXkeONOabK/P0oM8/UM6XlU4NsRmuyacp/wmr4E/a/wWfbsqroje5wg"
    "Pia9OPEy8VVhVcNeMpcHlGG5Obaq11XFsIBxRZrskP7PQLrpBJMxsaaLQKI0nfDUQ79h488/71V2aO4yETekk+1Pnm4uhl2GUq2n7Hce3E1Ci9"
    "w/KNd+X+lO704vdv8DT8vBpYF4DWA4Da1McaZwMpsa9g616YGdyc1b/nRa46z2V02LyMPbcttcHqqR3/sHl6eMtssMvvb6dCAeCaps1L4nbnSv"
    "9T4YbWKuyi2PtgQUGP+Ib8wwOBwSreXlZZWlF+eyhdddj9Vff8p4EM0QXr30eF3gZL2SDiwrF8dlH32407OBxrja2oO3bzwfz0SNZs8Idc8BHn"
    "66RCCi7i4ertVy/XuOe0eBLrdxfXaYroYpLuS/aVUKEsZcRFBzx75MujRguQbdeo2LYGb5fEV9/MRI1AIBCeKAyoztODMuUYypBqVMeBYnpUi7"
    "vdU7g+xoFY/Sk+weLEqo61UyBVPLMHtadDGB1JH+vDJfRn4hJytG4lpuj16mNMXD9cr4J/Mr9YXYyS6mKx+hXsQDv7bFlEgv/K67Q6Hpws/lJ9"
    "cK04P44DkMXhNUNi5RMzTm4OAoFA+B9TVV5fC+PSP5Q9Vz1Oryd+k4T+XQpcTre7i4SPQCAQCATCRiG/9SAQCAQC4R/lD4uRdd0="
)


@pytest.mark.parametrize(("text", "name"), [(CRASHES, "crashes"), (HANGS, "hangs")], ids=["crash", "hang"])
def test_what_kills_libhdf5_is_an_error_here(
    text: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files over which libhdf5 crashes or never ends are typed errors soon, and no process is left."""
    monkeypatch.setattr(hdf5_read, "_PATIENCE_S", 3.0)
    path = tmp_path / "x.h5"
    path.write_bytes(zlib.decompress(base64.b64decode(text)))
    children = Path(f"/proc/self/task/{threading.get_native_id()}/children")
    before = children.read_text().split()
    with pytest.raises(IntegrityError) as caught:
        files.read(path)
    assert caught.value.kind == "file_malformed", name
    assert children.read_text().split() == before


def test_libhdf5_sees_no_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that opens a stranger's file has nothing of the environment that it does not need to start."""
    path = tmp_path / "x.h5"
    files.write({"w": torch.ones(2)}, path, {})
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    seen: list[dict[str, str]] = []
    real = subprocess.Popen

    def start(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["env"])
        return real(*args, **kwargs)

    monkeypatch.setattr(subprocess, "Popen", start)
    assert torch.equal(files.read(path).state["w"], torch.ones(2))
    assert len(seen) == 1
    assert "PYTHONPATH" in seen[0]
    assert not [value for value in seen[0].values() if "secret" in value]


def test_what_a_reader_answers_is_no_more_trusted_than_the_file(tmp_path: Path) -> None:
    """An answer that points outside of the data, or is none, is refused: the other process may be taken over."""
    good = {"dtype": "float32", "shape": [4], "offset": 0}
    node = {"tensor": 0}
    answers: list[dict[str, Any]] = [
        {},
        {"blobs": [good | {"offset": 1}], "trees": [{"key": None, "node": node}], "top": "single"},
        {"blobs": [good | {"offset": -16}], "trees": [{"key": None, "node": node}], "top": "single"},
        {"blobs": [good | {"shape": [1 << 60]}], "trees": [{"key": None, "node": node}], "top": "single"},
        {"blobs": [good | {"shape": [-4]}], "trees": [{"key": None, "node": node}], "top": "single"},
        {"blobs": [good | {"shape": 4}], "trees": [{"key": None, "node": node}], "top": "single"},
        {"blobs": [good], "trees": [{"key": None, "node": {"tensor": 7}}], "top": "single"},
        {"blobs": [good], "trees": [{"key": [], "node": node}], "top": "dict"},
        {"blobs": [good], "trees": [{"key": "a", "node": node}] * 2, "top": "dict"},
        {"blobs": [good], "trees": [], "top": "single"},
    ]
    with (tmp_path / "data").open("w+b") as file:
        file.write(bytes(16))
        file.flush()
        for answer in answers:
            with pytest.raises(IntegrityError):
                hdf5_read._Inflating(answer, file.fileno(), "x.h5", limits.Allowance("x.h5", 1000)).state()
        whole = {"blobs": [good], "trees": [{"key": None, "node": node}], "top": "single"}
        state = hdf5_read._Inflating(whole, file.fileno(), "x.h5", limits.Allowance("x.h5", 1000)).state()
    assert torch.equal(state, torch.zeros(4))


def _peak_bytes() -> int:
    """The most memory this process ever had."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def test_what_is_no_file_is_not_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A pipe, a folder's absence, an unknown suffix: errors at once."""
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(StoreError, match="no regular file"):
        files.read(tmp_path / "pipe.pt")
    with pytest.raises(NotFoundError):
        files.read(tmp_path / "no.pt")
    with pytest.raises(UsageError):
        files.read(tmp_path / "x.zip")
    assert run(capsys, "import", tmp_path / "chain", tmp_path / "no.pt")[0] == 3
    (tmp_path / "empty").mkdir()
    assert run(capsys, "import", tmp_path / "chain", tmp_path / "empty")[0] == 3


def test_names_from_files_cannot_move_the_cursor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a file or its name says reaches a terminal as printable text."""
    path = tmp_path / "bad\x1b[2J.pt"
    torch.save({"x": Harm(print)}, path)
    assert main(["import", str(tmp_path / "chain"), str(path)]) == 4
    out = capsys.readouterr()
    assert "\x1b" not in out.out + out.err


def test_hdf5_is_only_needed_for_hdf5(tmp_path: Path) -> None:
    """Without h5py everything else works, and an .h5 file says what to install; the command line loads no torch."""
    program = (
        "import sys; sys.modules['h5py'] = None\n"
        "import ciuic_async.cli.main, ciuic_async.interchange.files as files\n"
        "assert 'torch' not in sys.modules\n"
        "from pathlib import Path\n"
        "files.write({'a': 1}, Path('x.pt'), {}); assert files.read(Path('x.pt')).state == {'a': 1}\n"
        "try: files.write({}, Path('x.h5'), {})\n"
        "except files.UsageError as error: print(error.kind, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("not_installed")
    assert "ciuic-async[hdf5]" in done.stdout


def test_an_allowance_counts_down() -> None:
    """What is taken is gone, and what is left is the bound of the next."""
    allowance = limits.Allowance("x", 100)
    allowance.take(60, "one")
    with pytest.raises(IntegrityError, match="at most 40"):
        allowance.take(41, "two")


def test_reading_leaves_no_thread_and_no_descriptor(tmp_path: Path, no_leaks: None) -> None:
    """Good files and bad ones are closed."""
    for suffix in FORMATS:
        path = tmp_path / f"x{suffix}"
        files.write({"w": torch.ones(2)}, path, {})
        assert files.read(path).size_bytes == path.stat().st_size
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(CiuicError):
            files.read(path)
    assert threading.active_count() < 20


def test_a_pickle_is_what_it_is_compared_with() -> None:
    """The hand-written pickles of these tests are ones that pickle itself reads."""
    assert len(pickle.loads(laughs(3))) == 2
