"""``ciuic`` as its users and their scripts see it: output, data, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ciuic_async
from ciuic_async.cli.main import main
from ciuic_async.cli.output import human_bytes, text


@pytest.fixture
def chain(tmp_path: Path) -> str:
    """Two snapshots of one tree, the second tagged and with metrics."""
    place = str(tmp_path / "chain")
    weight = torch.arange(100_000.0)
    ciuic_async.save({"model": {"weight": weight, "bias": torch.ones(3)}, "note": "a"}, place)
    weight[0] = 7.0
    ciuic_async.save(
        {"model": {"weight": weight, "bias": torch.ones(3)}, "note": "b"}, place, tags=["best"], metrics={"loss": 0.1}
    )
    return place


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command in this process."""
    try:
        code = main(arguments)
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    out = capsys.readouterr()
    return code, out.out, out.err


def test_log_json_has_the_documented_fields(chain: str, capsys: pytest.CaptureFixture[str]) -> None:
    """``log --json`` prints one object for each entry with the fields that scripts rely on."""
    code, out, err = run(capsys, "log", chain, "--json")
    entries = json.loads(out)
    assert (code, err) == (0, "")
    fields = {
        "id",
        "index",
        "kind",
        "step",
        "epoch",
        "batch",
        "created",
        "parent",
        "raw_bytes",
        "stored_bytes",
        "metrics",
        "tags",
    }
    assert all(fields <= set(entry) for entry in entries)
    assert [entry["kind"] for entry in entries] == ["key", "snapshot", "snapshot"]
    assert entries[2]["parent"] == entries[1]["id"]
    assert entries[2]["metrics"] == {"loss": 0.1}
    assert entries[2]["tags"] == ["best"]


def test_log_for_people_is_one_line_a_snapshot_newest_first(chain: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Without ``--json`` each snapshot is a line, and other kinds appear with ``--all`` only."""
    ids = [snapshot.id for snapshot in ciuic_async.SnapshotChain(chain)]
    code, out, _ = run(capsys, "log", chain)
    lines = out.splitlines()[1:]
    assert code == 0
    assert [line.split()[1] for line in lines] == ids[::-1]
    assert "loss=0.1" in lines[0]
    assert "[best]" in lines[0]
    assert "(key)" in run(capsys, "log", chain, "--all")[1]
    assert len(run(capsys, "log", chain, "-n", "1")[1].splitlines()) == 2


def test_show_tells_facts_and_tensors(chain: str, capsys: pytest.CaptureFixture[str]) -> None:
    """``show`` finds a snapshot by tag and lists its tensors with dtype and shape."""
    code, out, _ = run(capsys, "show", chain, "best", "--json")
    facts = json.loads(out)
    assert code == 0
    assert {"path": "model.weight", "dtype": "float32", "shape": [100_000], "raw_bytes": 400_000} in facts["tensors"]
    assert facts["names"] == ["model", "note"]
    assert "100000" in run(capsys, "show", chain, "best", "--tensors")[1]


def test_verify_is_silent_on_stderr_and_zero_when_all_is_well(chain: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A good chain verifies with exit code 0, and says how deep it looked."""
    code, out, err = run(capsys, "verify", chain, "--json")
    report = json.loads(out)
    assert (code, err) == (0, "")
    assert report["ok"] is True
    assert report["problems"] == []
    assert report["level"].startswith("chunk data")
    assert json.loads(run(capsys, "verify", chain, "--quick", "--json")[1])["level"].startswith("manifests")


@pytest.mark.damages
def test_verify_exits_4_and_names_snapshot_and_tensor(chain: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One flipped bit in the data of a tensor: exit code 4, and the problem says which tensor of which snapshot."""
    segment = max(Path(chain).glob("segments/*/*.seg"), key=lambda path: path.stat().st_mtime)
    data = bytearray(segment.read_bytes())
    data[len(data) // 3] ^= 1
    segment.write_bytes(data)
    code, out, _ = run(capsys, "verify", chain, "--json")
    problems = json.loads(out)["problems"]
    assert code == 4
    assert {"kind", "where", "snapshot", "tensor", "message"} <= set(problems[0])
    assert any(p["tensor"] == "model.weight" and p["snapshot"] == segment.parent.name for p in problems)
    assert segment.name in run(capsys, "verify", chain)[1]


@pytest.mark.damages
def test_verify_reports_a_damaged_chain_file(chain: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Damage to ``ciuic.json`` itself is reported, not a crash or "no chain"."""
    path = Path(chain, "ciuic.json")
    path.write_bytes(path.read_bytes()[:-1])
    code, out, _ = run(capsys, "verify", chain, "--json")
    assert code == 4
    assert json.loads(out)["problems"][0]["where"] == "ciuic.json"


@pytest.mark.parametrize(
    "command", [["log"], ["show"], ["verify"], ["keys", "show"], ["export", "{}", "latest", "x.safetensors"]]
)
def test_a_missing_chain_is_exit_3_and_nothing_is_made(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reading commands make no folder, say what is missing, and exit with 3."""
    place = str(tmp_path / "nothing")
    arguments = [part.format(place) for part in command] if "{}" in command else [*command, place]
    code, _, err = run(capsys, *arguments)
    assert code == 3
    assert place in err
    assert not Path(place).exists()


def test_an_unknown_ref_is_exit_3_and_names_the_newest(chain: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A ref that is not there exits with 3 and helps."""
    code, out, err = run(capsys, "show", chain, "step:99", "--json")
    assert code == 3
    assert "ciuic log" in err
    assert json.loads(out)["error"]["kind"] == "no_such_snapshot"


@pytest.mark.parametrize("arguments", [[], ["bogus"], ["log"], ["log", "--bogus", "x"], ["export", "a"]])
def test_wrong_usage_is_exit_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever the parser refuses exits with 2 and prints the usage on stderr."""
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert "usage: ciuic" in err


def test_an_unknown_export_format_is_exit_2(chain: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The suffix chooses the format; one that is none is a usage error, and no file appears."""
    target = tmp_path / "x.onnx"
    assert run(capsys, "export", chain, "latest", str(target))[0] == 2
    assert not target.exists()


def test_export_writes_what_safetensors_reads(chain: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The exported file holds the same bits under dotted names, and says which snapshot it came from."""
    from safetensors import safe_open

    target = tmp_path / "x.safetensors"
    code, out, _ = run(capsys, "export", chain, "best", str(target), "--only", "model", "--json")
    assert code == 0
    assert json.loads(out)["size_bytes"] == target.stat().st_size
    with safe_open(target, framework="pt") as file:
        assert set(file.keys()) == {"model.weight", "model.bias"}
        assert file.get_tensor("model.weight")[0].item() == 7.0
        assert file.metadata()["ciuic.snapshot"] == json.loads(out)["snapshot"]


def test_keys_show_prints_the_key_that_signs(chain: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The vkey is the one in the chain, the path a private file outside it; the secret is not printed."""
    code, out, _ = run(capsys, "keys", "show", chain, "--json")
    keys = json.loads(out)
    assert code == 0
    assert keys["vkey"] in keys["chain_keys"]
    assert Path(keys["path"]).stat().st_mode & 0o777 == 0o600
    assert Path(keys["path"]).read_text().strip() not in out


def test_doctor_tries_every_primitive_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``doctor FOLDER`` reports on machine and place, and removes its trial files."""
    code, out, _ = run(capsys, "doctor", str(tmp_path / "later"), "--json")
    names = {finding["name"] for finding in json.loads(out)["findings"]}
    assert code == 0
    assert {"native core", "create once", "commit", "write"} <= names
    assert [path.name for path in tmp_path.iterdir() if "doctor" in path.name] == []


def test_doctor_fails_on_a_place_that_cannot_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    """A place where no folder can be made is exit code 1 with a reason."""
    code, out, _ = run(capsys, "doctor", "/proc/nothing-here", "--json")
    assert code == 1
    assert any(finding["ok"] is False for finding in json.loads(out)["findings"])


def test_a_reader_that_leaves_early_is_no_traceback(chain: str) -> None:
    """``ciuic log CHAIN | head -1`` ends quietly."""
    program = f"{sys.executable} -m ciuic_async.cli.main log {chain} --all --json | head -1"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "["
    assert "Traceback" not in done.stderr


def test_text_from_a_chain_cannot_move_the_cursor() -> None:
    """Control characters in tags, names or epochs are printed as question marks."""
    assert text("a\x1b[2Jb\nc") == "a?[2Jb?c"
    assert text(None) == "-"


@pytest.mark.parametrize(
    ("size", "shown"), [(None, "-"), (999, "999 B"), (1_000, "1.0 kB"), (12_345_678, "12.3 MB"), (10**13, "10.0 TB")]
)
def test_sizes_are_readable(size: int | None, shown: str) -> None:
    """Decimal units, one digit."""
    assert human_bytes(size) == shown
