"""``ciuic import`` while it runs: files that turn out to be bad late, that change, that are many; what is left out."""

from __future__ import annotations

import io
import json
import os
import sys
import weakref
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ciuic_async import SnapshotChain, save
from ciuic_async.cli.main import main
from ciuic_async.errors import CiuicWarning, StoreError, UsageError
from ciuic_async.interchange import files, usual


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Any, str]:
    """Exit code, data and stderr of a command with ``--json``."""
    capsys.readouterr()
    code = main([*map(str, arguments), "--json"])
    out = capsys.readouterr()
    return code, json.loads(out.out) if out.out.strip() else None, out.err


def good(folder: Path, step: int) -> Path:
    """A file of one step."""
    path = folder / f"model-step={step}.safetensors"
    save_file({"weight": torch.full((4,), float(step))}, path)
    return path


def bad_data(folder: Path, step: int) -> Path:
    """An HDF5 file whose structure is good and whose elements are not: their checksum shows it when they are read."""
    path = folder / f"model-step={step}.h5"
    with h5py.File(path, "w") as file:
        made = file.create_dataset("weight", data=np.arange(1000.0), chunks=(1000,), fletcher32=True)
        offset = made.id.get_chunk_info(0).byte_offset
    data = bytearray(path.read_bytes())
    data[offset + 100] ^= 1
    path.write_bytes(data)
    return path


def test_skip_bad_passes_over_files_whose_data_is_bad(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Damage that only reading everything shows is a refused file like others: those behind it are imported."""
    for make, step in ((good, 1), (bad_data, 2), (good, 3)):
        make(tmp_path, step)
    code, found, err = run(capsys, "import", tmp_path / "chain", tmp_path, "--skip-bad")
    assert (code, [item["outcome"] for item in found]) == (4, ["imported", "refused", "imported"])
    assert found[1]["error"]["kind"] == "file_malformed"
    assert "model-step=2.h5" in err
    with SnapshotChain(tmp_path / "chain", create=False) as chain:
        assert [snapshot.step for snapshot in chain] == [1, 3]


def test_an_import_that_ends_early_says_how_far_it_came(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without --skip-bad it ends at such a file; the report has what was imported, and the next call goes on."""
    for make, step in ((good, 1), (bad_data, 2), (good, 3)):
        make(tmp_path, step)
    code, found, err = run(capsys, "import", tmp_path / "chain", tmp_path)
    assert (code, [item["outcome"] for item in found]) == (4, ["imported", "refused", "new"])
    assert "1 of 3 files were imported" in err
    good(tmp_path, 2)
    (tmp_path / "model-step=2.h5").unlink()
    code, found, _ = run(capsys, "import", tmp_path / "chain", tmp_path)
    assert (code, [item["outcome"] for item in found]) == (0, ["known", "imported", "imported"])


def test_a_damaged_tensor_of_a_pt_file_is_found_before_anything_is_imported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A dry run finds it too: checksums are looked at while structure is read."""
    first, second = good(tmp_path, 1), tmp_path / "step_2.pt"
    torch.save({"weight": torch.full((1000,), 1.5)}, second)
    data = bytearray(second.read_bytes())
    data[data.index(torch.full((4,), 1.5).numpy().tobytes()) + 5] ^= 4
    second.write_bytes(data)
    code, found, _ = run(capsys, "import", tmp_path / "chain", first, second, "--dry-run")
    assert (code, [item["outcome"] for item in found]) == (4, ["new", "refused"])
    assert run(capsys, "import", tmp_path / "chain", first, second)[0] == 4
    assert not (tmp_path / "chain").exists()


def test_a_file_that_changes_after_it_was_looked_at_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training that writes on meanwhile: what was looked at is not what would be imported. Exit code 1, by name."""
    path, read = good(tmp_path, 1), files.read

    def then_changed(path: Path, *, load_data: bool = True) -> files.Content:
        content = read(path, load_data=load_data)
        if not load_data:
            save_file({"weight": torch.zeros(4)}, path)
        return content

    monkeypatch.setattr(files, "read", then_changed)
    code, found, _ = run(capsys, "import", tmp_path / "chain", path)
    assert (code, found[0]["error"]["kind"]) == (1, "file_changed")


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digest that is recorded is that of the state: a file that is replaced in between is neither."""
    path = good(tmp_path, 1)
    digest = files.file_digest

    def then_replaced(file: Any, name: str) -> Any:
        found = digest(file, name)
        save_file({"weight": torch.zeros(4)}, tmp_path / "other.safetensors")
        (tmp_path / "other.safetensors").replace(path)
        return found

    monkeypatch.setattr(files, "file_digest", then_replaced)
    with pytest.raises(StoreError) as caught:
        files.read(path)
    assert caught.value.kind == "file_changed"


def test_one_state_is_in_memory_at_a_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state of a file is let go before the next one is read."""
    for step in range(3):
        good(tmp_path, step)
    read, alive, seen = files.read, weakref.WeakSet[torch.Tensor](), []

    def counted(path: Path, *, load_data: bool = True) -> files.Content:
        seen.append(len(alive))
        content = read(path, load_data=load_data)
        alive.add(content.state["weight"])
        return content

    monkeypatch.setattr(files, "read", counted)
    assert run(capsys, "import", tmp_path / "chain", tmp_path)[0] == 0
    assert len(seen) == 6
    assert max(seen[4:]) == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="to root no folder is closed")
def test_a_folder_that_cannot_be_searched_is_no_empty_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its files would be missed when the originals are gone."""
    good(tmp_path, 1)
    (tmp_path / "closed").mkdir(mode=0)
    code, found, _ = run(capsys, "import", tmp_path / "chain", tmp_path)
    (tmp_path / "closed").chmod(0o700)
    assert (code, found["error"]["kind"]) == (1, "unreadable")


def test_names_that_are_no_text_are_reported(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    """A file name in another encoding breaks no report: data stays JSON, a table stays text."""
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/w\xff.safetensors"))
    good(tmp_path, 1).rename(path)
    assert main(["import", str(tmp_path / "chain"), str(path), "--json"]) == 0
    assert json.loads(capfdbinary.readouterr().out)[0]["file"] == str(path)
    assert main(["import", str(tmp_path / "chain"), str(path)]) == 0
    assert b"w?.safetensors" in capfdbinary.readouterr().out


def test_progress_is_shown_on_a_terminal_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand files take a while: a person sees how far it is, a log file stays as it was."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    good(tmp_path, 1)
    assert run(capsys, "import", tmp_path / "chain", tmp_path)[2] == ""
    good(tmp_path, 2)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main(["import", str(tmp_path / "chain"), str(tmp_path), "--json"]) == 0
    assert "looking" in terminal.getvalue()
    assert "importing" in terminal.getvalue()


def test_a_wrong_tag_makes_no_chain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A usage error is found before anything is there."""
    assert run(capsys, "import", tmp_path / "chain", good(tmp_path, 1), "--tag", "")[0] == 2
    assert not (tmp_path / "chain").exists()


# --- out --------------------------------------------------------------------------------------------------------------


def test_what_safetensors_leaves_out_is_told(tmp_path: Path) -> None:
    """Arrays, bytes and sets have no place in that format: they are not lost in silence."""
    state = {"weight": torch.ones(2), "array": np.ones(3), "deep": {"raw": b"12", "set": {1}}, "lr": 0.1}
    snapshot = save(state, tmp_path / "chain")
    with pytest.warns(CiuicWarning, match=r"bytes: left out \(1 times\), numpy.ndarray: left out \(1 times\), set"):
        path = snapshot.export(tmp_path / "out.safetensors")
    assert set(files.read(path).state) >= {"weight", "lr"}


def test_two_values_of_one_dotted_name_are_refused(tmp_path: Path) -> None:
    """As two tensors are: one of them would be lost."""
    with pytest.raises(UsageError) as caught:
        files.write({"a": {"b": 1}, "a.b": 2, "w": torch.ones(1)}, tmp_path / "out.safetensors", {})
    assert caught.value.kind == "duplicate_name"
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_called_metadata_is_refused(tmp_path: Path) -> None:
    """That name is the format's own: a file with such a tensor could be read by nobody."""
    with pytest.raises(UsageError, match="__metadata__"):
        files.write({"__metadata__": torch.ones(1)}, tmp_path / "out.safetensors", {})
    assert list(tmp_path.iterdir()) == []


def test_facts_of_odd_elements_are_none(tmp_path: Path) -> None:
    """An element that torch cannot turn into a number is no metric, and no traceback."""
    path = tmp_path / "a.pt"
    torch.save({"loss": torch.zeros((), dtype=torch.float4_e2m1fn_x2)}, path)
    assert usual.facts(files.read(path).state, path).metrics == {}
