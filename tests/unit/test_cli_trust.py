"""``ciuic verify``, ``keys``, ``receipt`` and ``chain`` as users and scripts see them; and what a fork carries."""

from __future__ import annotations

import base64
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import ciuic_async
from ciuic_async import Checkpointer, KeepLatest, SnapshotChain
from ciuic_async.cli.main import main
from ciuic_async.cli.output import message
from ciuic_async.errors import IntegrityError
from ciuic_async.fork import fork
from ciuic_async.format import layout
from ciuic_async.format.entry import KeyEntry
from ciuic_async.stores.local import LocalStore
from ciuic_async.transparency import keys, note
from ciuic_async.transparency.keys import SigningKey
from ciuic_async.transparency.log import Log
from ciuic_async.transparency.pins import Pins
from ciuic_async.transparency.policy import Policy


@pytest.fixture
def chain(tmp_path: Path) -> str:
    """Two snapshots of one tree."""
    place = str(tmp_path / "chain")
    for value in (1.0, 2.0):
        ciuic_async.save({"w": torch.full((1000,), value)}, place)
    return place


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command in this process."""
    try:
        code = main(arguments)
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    out = capsys.readouterr()
    return code, out.out, out.err


def data(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> Any:
    """What a command with ``--json`` prints."""
    found, out, err = run(capsys, *arguments, "--json")
    assert found == code, err
    return json.loads(out)


# --- verify -----------------------------------------------------------------------------------------------------------


def test_verify_prints_levels_in_order_and_pins(chain: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line a level, then the verdict; JSON has them too; ``--no-pin`` looks at no pin."""
    names = ["signature", "tiles", "entries", "manifests", "chunk data", "pinned", "witnessed", "fresh", "timestamped"]
    code, out, err = run(capsys, "verify", chain)
    assert (code, err) == (0, "")
    assert [line[:12].strip() for line in out.splitlines()[:-1]] == names
    report = data(capsys, "verify", chain)
    assert [level["name"] for level in report["levels"]] == names
    assert report["level"] == "chunk data, pinned"
    report = data(capsys, "verify", chain, "--no-pin")
    assert report["level"] == "chunk data (integrity only)"


def test_verify_by_key_and_policy(chain: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The key of ``keys show`` and the policy of ``chain policy`` are taken; another key is exit code 4."""
    key = data(capsys, "keys", "show", chain)["vkey"]
    policy = tmp_path / "policy.txt"
    policy.write_text(run(capsys, "chain", "policy", chain)[1])
    assert data(capsys, "chain", "policy", chain)["logs"] == [key]
    assert [str(vkey) for vkey in Policy.load(policy).logs] == [key]
    for options in (["--key", key], ["--policy", str(policy)], ["--policy", str(policy), "--endorsed"]):
        assert data(capsys, "verify", chain, "--no-pin", "--max-age", "1h", *options)["level"] == "chunk data, fresh"
    other = SigningKey.generate().vkey(SnapshotChain(chain).origin)
    report = data(capsys, "verify", chain, "--key", other, code=4)
    assert [problem["kind"] for problem in report["problems"]] == ["signer_untrusted"]
    assert "signer_untrusted" in run(capsys, "verify", chain, "--key", other)[1]


@pytest.mark.parametrize(
    "options", [["--key", "none"], ["--policy", "/none"], ["--endorsed"], ["--max-age", "soon"], ["--max-age", "-1"]]
)
def test_verify_refuses_what_it_cannot_use(chain: str, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Options that mean nothing are exit code 2 before anything is read."""
    code, out, err = run(capsys, "verify", chain, *options)
    assert (code, out) == (2, "")
    assert err


@pytest.mark.damages
def test_a_hostile_policy_copy_moves_no_cursor(chain: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What a chain holds is printed as text: no control character reaches the terminal."""
    Path(chain, layout.POLICY).write_bytes(b"\x1b[2Jboo \xc2\x9b1m\n")
    code, out, err = run(capsys, "verify", chain)
    assert code == 4
    assert "policy_malformed" in out
    assert all(char.isprintable() or char == "\n" for char in out + err)


@pytest.mark.damages
def test_a_hostile_error_moves_no_cursor(chain: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Errors, warnings and log lines that quote a file of the chain are printed as text too, and keep their lines."""
    file = Path(chain, layout.CHAIN_FILE)
    good = file.read_bytes()
    file.write_bytes(good.replace(b"ciuic.dev/chain/v1", b"ciuic.dev/chain/v9\\u001b[2J\xe2\x80\xae"))
    code, out, err = run(capsys, "log", chain)
    assert (code, out) == (4, "")
    assert "upgrade ciuic-async" in err
    assert all(char.isprintable() or char == "\n" for char in err)
    file.write_bytes(good)
    assert message("two\nlines\x1b[2J") == "two\nlines?[2J"


def test_log_shows_at_least_one_line(chain: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A limit that would show nothing, or all but the oldest, is a usage error and not "no snapshots yet"."""
    for limit in ("0", "-1"):
        code, out, err = run(capsys, "log", chain, "--limit", limit)
        assert (code, out) == (2, "")
        assert "--limit" in err


def test_a_reason_that_cannot_be_recorded_replaces_no_pin(chain: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Too long with what goes before it, or no text: exit code 2, and the pin and the history are what they were."""
    assert run(capsys, "verify", chain)[0] == 0
    with SnapshotChain(chain) as opened:
        path = Path(Pins.of_user().path(opened.origin))
        opened.latest()
        before = path.read_bytes(), opened.log_size
    for reason in ("x" * 10_000, "\udcff"):
        assert run(capsys, "chain", "repin", chain, "--reason", reason)[0] == 2
        with SnapshotChain(chain) as opened:
            opened.latest()
            assert (path.read_bytes(), opened.log_size) == before
        assert not list(path.parent.glob("*.replaced"))
        assert run(capsys, "rollback", chain, "latest", "--reason", reason + "x")[0] == 2


# --- keys -------------------------------------------------------------------------------------------------------------


def test_keys_new(chain: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A key for its owner only, its verifier key for a chain, and never over another file."""
    path = str(tmp_path / "made" / "key")
    made = data(capsys, "keys", "new", chain, "--path", path)
    assert made["path"] == path
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    with SnapshotChain(chain, key=path) as opened:
        assert opened.signing_key() == (made["vkey"], path)
    before = Path(path).read_bytes()
    assert run(capsys, "keys", "new", "--path", path)[0] == 2
    assert Path(path).read_bytes() == before
    assert run(capsys, "keys", "new", str(tmp_path / "no-chain"), "--path", str(tmp_path / "other"))[0] == 3
    assert not (tmp_path / "other").exists()
    assert run(capsys, "keys", "new")[0] == 2, "the user's own is there already"


def _line_start(vkey: str) -> str:
    """How the base64 of a signature line by a key begins: its key ID."""
    return base64.b64encode(note.parse_vkey(vkey).key_id).decode()[:5]


def test_keys_rotate(chain: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The old key announces the new one, which signs from then on; the old file is kept; both verify by a policy."""
    old = data(capsys, "keys", "show", chain)
    done = data(capsys, "keys", "rotate", chain)
    assert (done["old_vkey"], done["path"]) == (old["vkey"], old["path"])
    assert stat.S_IMODE(os.stat(done["old_path"]).st_mode) == 0o600
    assert data(capsys, "keys", "show", chain)["vkey"] == done["vkey"]
    assert not os.path.exists(f"{old['path']}.new")
    with SnapshotChain(chain) as opened:
        assert opened.keys() == [old["vkey"], done["vkey"]]
        announced = opened.log()[-2]
        assert (announced["kind"], announced["vkey"]) == ("key", done["vkey"])
        slot = Path(chain, layout.slot(announced["index"])).read_text()
        assert f"\u2014 {opened.origin} {_line_start(old['vkey'])}" in slot
    assert data(capsys, "verify", chain, "--key", done["vkey"])["ok"]
    assert data(capsys, "verify", chain, "--key", old["vkey"], code=4)["problems"][0]["kind"] == "signer_untrusted"
    both = ["--key", old["vkey"], "--key", done["vkey"], "--endorsed"]
    assert data(capsys, "verify", chain, *both)["ok"]
    ciuic_async.save({"w": torch.zeros(3)}, chain)
    assert data(capsys, "verify", chain, "--key", done["vkey"])["ok"]


def test_a_rotation_that_was_cut_off_goes_on(
    chain: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The announcement is durable and the file could not be put in place: the old key still signs; again, and the same
    new key takes over, announced once.
    """
    old = data(capsys, "keys", "show", chain)
    with monkeypatch.context() as broken:
        broken.setattr(keys, "fsync_folder", lambda folder: (_ for _ in ()).throw(OSError(5, "broken")))
        Path(f"{old['path']}.new").write_text(SigningKey.generate().secret() + "\n")
        Path(f"{old['path']}.new").chmod(0o600)
        assert run(capsys, "keys", "rotate", chain)[0] == 2
    assert data(capsys, "keys", "show", chain)["vkey"] == old["vkey"]
    ciuic_async.save({"w": torch.zeros(3)}, chain)
    done = data(capsys, "keys", "rotate", chain)
    with SnapshotChain(chain) as opened:
        assert opened.keys() == [old["vkey"], done["vkey"]]
        assert [entry["kind"] for entry in opened.log()].count("key") == 2


def test_rotation_needs_a_key_that_signed(
    chain: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key that never wrote here has no say, a secret in the environment has no file, and nobody has none at all."""
    stranger = str(tmp_path / "stranger")
    data(capsys, "keys", "new", "--path", stranger)
    assert data(capsys, "keys", "rotate", chain, "--key", stranger, code=2)["error"]["kind"] == "key_unknown"
    monkeypatch.setenv("CIUIC_KEY", SigningKey.generate().secret())
    assert data(capsys, "keys", "rotate", chain, code=2)["error"]["kind"] == "key_not_in_file"
    monkeypatch.delenv("CIUIC_KEY")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "elsewhere"))
    assert data(capsys, "keys", "rotate", chain, code=3)["error"]["kind"] == "no_key"


# --- receipts ---------------------------------------------------------------------------------------------------------


def test_a_receipt_is_checked_without_the_chain(chain: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Printed or written to a file, checked by key or policy after the chain is gone; never by nobody's key."""
    path = str(tmp_path / "r.tlog-proof")
    key = data(capsys, "keys", "show", chain)["vkey"]
    with SnapshotChain(chain) as opened:
        snapshot = opened.get("latest~1")
        (tmp_path / "entry").write_bytes(opened.entry_bytes(snapshot.index))
    code, out, _ = run(capsys, "receipt", chain, "latest~1")
    assert code == 0
    assert data(capsys, "receipt", chain, "latest~1", "-o", path)["id"] == snapshot.id
    assert Path(path).read_text() == out
    assert run(capsys, "receipt", chain, "-o", path)[0] == 2, "never over a file"
    found = data(capsys, "receipt", "--check", path, "--key", key, "--entry", chain)
    assert (found["ok"], found["snapshot"], found["index"], found["size"]) == (True, snapshot.id, snapshot.index, 3)
    away = Path(chain).rename(tmp_path / "away")
    assert data(capsys, "receipt", "--check", path, "--key", key)["signers"] == [key]
    assert run(capsys, "receipt", "--check", path, "--key", key, "--entry", str(tmp_path / "entry"))[0] == 0
    assert run(capsys, "receipt", "--check", path)[0] == 2
    assert run(capsys, "receipt")[0] == 2
    assert run(capsys, "receipt", str(away), "--key", key)[0] == 2
    assert run(capsys, "receipt", str(away), "--check", path, "--key", key)[0] == 2
    (tmp_path / "entry").write_bytes(b"another")
    code = run(capsys, "receipt", "--check", path, "--key", key, "--entry", str(tmp_path / "entry"))[0]
    assert code == 4
    stranger = SigningKey.generate().vkey(SnapshotChain(away).origin)
    assert data(capsys, "receipt", "--check", path, "--key", stranger, code=4)["error"]["kind"] == "signer_unknown"


def test_a_receipt_must_have_the_quorum_that_a_policy_asks_for(
    chain: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the witness's cosignature it is refused, with it it says who witnessed it and when."""
    witness = SigningKey.generate()
    policy, path = tmp_path / "policy", tmp_path / "receipt"
    key = data(capsys, "keys", "show", chain)["vkey"]
    policy.write_text(f"log {key}\nwitness w {witness.cosigner('w.example')}\nquorum w\n")
    path.write_text(run(capsys, "receipt", chain)[1])
    arguments = ["receipt", "--check", str(path), "--policy", str(policy)]
    assert data(capsys, *arguments, code=4)["error"]["kind"] == "not_witnessed"
    above, _, head = path.read_text().partition("\n\n")
    parsed = note.parse(head.encode(), "head")
    signatures = (*parsed.signatures, witness.cosign("w.example", parsed.text, 1234))
    path.write_text(f"{above}\n\n{note.format_note(parsed.text, signatures)}")
    found = data(capsys, *arguments)
    assert (found["witnessed"], found["cosigned_s"]) == ("1/1", [1234])


# --- the ways out -----------------------------------------------------------------------------------------------------


def test_a_restored_backup_is_repinned(chain: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The store was put back: refused with both ways out named, then repinned with a reason that history keeps."""
    shutil.copytree(chain, tmp_path / "backup")
    ciuic_async.save({"w": torch.zeros(3)}, chain)
    shutil.rmtree(chain)
    shutil.copytree(tmp_path / "backup", chain)
    error = data(capsys, "log", chain, code=4)["error"]
    assert error["kind"] == "pin_rollback"
    assert "chain repin" in error["message"]
    assert "chain fork" in error["message"]
    assert data(capsys, "verify", chain, code=4)["problems"][0]["kind"] == "pin_rollback"
    done = data(capsys, "chain", "repin", chain, "--reason", "the disk died")
    assert (done["size"], done["noted"]) == (3, True)
    assert b"\n4\n" in Path(done["replaced"]).read_bytes()
    assert "the disk died" in data(capsys, "log", chain)[-1]["text"]
    assert data(capsys, "verify", chain)["level"] == "chunk data, pinned"
    shutil.rmtree(tmp_path / "backup")


def test_a_reader_repins_without_writing(
    chain: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who has no key of the chain gets a pin, and nothing is added to the log."""
    for name in ("CONFIG", "STATE"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(tmp_path / "nobody" / name))
    done = data(capsys, "chain", "repin", chain, "--reason", "new here")
    assert (done["noted"], done["replaced"]) == (False, None)
    assert len(data(capsys, "log", chain)) == 3
    assert not (tmp_path / "nobody" / "CONFIG").exists()


def _steps(path: Path | str, wanted: range = range(5)) -> dict[str, torch.Tensor]:
    """A chain with a frozen tensor, deltas, tags, a pruned owner of shared chunks and an abandoned branch."""
    weight, frozen = torch.randn(60_000), torch.randn(300_000)
    content = {}
    with Checkpointer(path, {"w": weight, "frozen": frozen}, rng=False, codec="smallest") as ckpt:
        for value in wanted:
            weight += 0.001
            content[ckpt.save(tags=[f"t{value}"]).wait_durable(30).id] = weight.clone()
    with SnapshotChain(path) as opened:
        opened.prune(KeepLatest(len(wanted) - 1))
        opened.rollback("t2", "worse since")
        opened.tag("good", "latest")
    return content


def test_a_fork_carries_all_that_lives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A copied run goes on under a name of its own: same snapshots, bytes, tags, line and parents; chunks and delta
    bases of pruned owners come along; entry 0 quotes the old head; the old chain is untouched.
    """
    source, destination = tmp_path / "chain", tmp_path / "fork"
    content = _steps(source)
    before = {file: file.read_bytes() for file in source.rglob("*") if file.is_file()}
    done = data(capsys, "chain", "fork", str(source), str(destination), "--reason", "copied")
    assert {file: file.read_bytes() for file in source.rglob("*") if file.is_file()} == before
    with SnapshotChain(source) as old, SnapshotChain(destination) as new:
        assert done["origin"] == new.origin != old.origin == done["previous_origin"]
        assert {s.id for s in new} == {s.id for s in old}
        assert done["snapshots"] == len(new) == 4
        facts = {s.id: (s.tags, s.parent, s.step, s.created, s.metrics) for s in new}
        pruned = next(iter(content))
        for snapshot in old:
            parent = None if snapshot.parent == pruned else snapshot.parent
            assert facts[snapshot.id][0] == snapshot.tags
            assert facts[snapshot.id][1:] == (parent, snapshot.step, snapshot.created, snapshot.metrics)
            assert torch.equal(new.get(snapshot.id).load()["w"], content[snapshot.id])
        assert [s.id for s in new.newest_first()] == [s.id for s in old.newest_first()]
        assert new.get("good").id == old.get("good").id
        report = new.verify()
        assert (report.problems, report.notes, report.level) == ((), (), "chunk data, pinned")
        head = (source / layout.LOG_HEAD).read_text()
    with _log(destination) as log:
        first = log.entry(0)
        assert isinstance(first, KeyEntry)
        assert first.previous == head
    shutil.rmtree(source)
    with Checkpointer(destination, {"w": torch.zeros(60_000), "frozen": torch.zeros(300_000)}, rng=False) as ckpt:
        assert ckpt.restore() is not None
        ckpt.save().wait_durable(30)
    with SnapshotChain(destination) as new:
        new.gc(orphan_age_s=0.0)
        new.prune(KeepLatest(2))
        assert new.verify().ok


@contextmanager
def _log(path: Path) -> Iterator[Log]:
    """The log at a place."""
    with SnapshotChain(path) as chain, closing(LocalStore(path)) as store:
        log = Log(store, chain.origin)
        log.refresh()
        yield log


@pytest.mark.damages
def test_a_fork_that_cannot_be_whole_is_refused(chain: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Into a place that holds something, from none, or from a damaged chain: a typed error, and no snapshot is made."""
    assert run(capsys, "chain", "fork", chain, chain, "--reason", "x")[0] == 2
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    assert run(capsys, "chain", "fork", chain, str(tmp_path / "full"), "--reason", "x")[0] == 2
    assert run(capsys, "chain", "fork", str(tmp_path / "none"), str(tmp_path / "f"), "--reason", "x")[0] == 3
    segment = next(Path(chain).glob("segments/*/*.seg"))
    damaged = bytearray(segment.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    segment.chmod(0o644)
    segment.write_bytes(damaged)
    with pytest.raises(IntegrityError):
        fork(chain, tmp_path / "fork", reason="x")
    with SnapshotChain(tmp_path / "fork", create=False) as made:
        assert len(made) == 0
