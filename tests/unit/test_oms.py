"""Signed exports: the official verifier of OpenSSF Model Signing accepts them, and nothing that was changed since."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
)

import ciuic_async
from ciuic_async.cli.main import main
from ciuic_async.errors import StoreError, UsageError
from ciuic_async.pipeline import oms, oms_key

verifying = pytest.importorskip("model_signing.verifying", reason="model-signing is not installed")


@pytest.fixture
def chain(tmp_path: Path) -> str:
    """A chain of one snapshot."""
    place = str(tmp_path / "chain")
    ciuic_async.save({"model": {"weight": torch.arange(5000.0)}}, place)
    return place


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An empty folder to export into."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def export(capsys: pytest.CaptureFixture[str], chain: str, path: Path, *options: str) -> tuple[int, dict[str, Any]]:
    """``ciuic export --oms --json``: exit code and data."""
    code = main(["export", chain, "latest", str(path), "--oms", "--json", *options])
    return code, json.loads(capsys.readouterr().out)


def verifies(model: Path, public_key: str | Path) -> bool:
    """What the official verifier says of a model and the ``model.sig`` beside it."""
    try:
        verifying.Config().use_elliptic_key_verifier(public_key=public_key).verify(model, model.parent / "model.sig")
    except Exception:
        return False
    return True


def pem(private: Any, encryption: KeySerializationEncryption | None = None) -> bytes:
    data: bytes = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption or NoEncryption())
    return data


def key_file(path: Path, data: bytes, mode: int = 0o600) -> str:
    path.write_bytes(data)
    path.chmod(mode)
    return str(path)


def test_the_official_verifier_accepts_an_export(chain: str, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the key made on first use: accepted, also after a second export and after the file was renamed."""
    model = out / "weights.safetensors"
    code, found = export(capsys, chain, model)
    assert code == 0
    assert found["signature"] == str(out / "model.sig")
    assert Path(found["key"] + ".pub").read_text() == found["public_key"]
    assert stat.S_IMODE(Path(found["key"]).stat().st_mode) == 0o600
    assert verifies(model, found["key"] + ".pub")
    assert export(capsys, chain, model, "--force")[1]["public_key"] == found["public_key"]
    assert verifies(model, found["key"] + ".pub")
    assert verifies(model.rename(out / "renamed.safetensors"), found["key"] + ".pub")
    assert sorted(item.name for item in out.iterdir()) == ["model.sig", "renamed.safetensors"]


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: curve.name)
def test_every_curve_of_the_format_signs(
    chain: str, out: Path, tmp_path: Path, curve: ec.EllipticCurve, capsys: pytest.CaptureFixture[str]
) -> None:
    """A key of the user's own, on each curve that the format knows: accepted under its public half, by no other's."""
    key = key_file(tmp_path / "own.pem", pem(ec.generate_private_key(curve)))
    code, found = export(capsys, chain, out / "m.safetensors", "--oms-key", key)
    public = tmp_path / "own.pub"
    public.write_text(found["public_key"])
    assert (code, found["key"]) == (0, key)
    assert verifies(out / "m.safetensors", public)
    other = oms_key.OmsKey(ec.generate_private_key(curve), "")
    public.write_bytes(other.public_pem)
    assert not verifies(out / "m.safetensors", public)


@pytest.mark.parametrize("place", ["first", "middle", "last", "appended", "cut"])
def test_one_changed_byte_is_refused(chain: str, out: Path, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A flipped bit, a byte more or a byte less in the model: the official verifier refuses it."""
    model = out / "m.safetensors"
    _, found = export(capsys, chain, model)
    data = bytearray(model.read_bytes())
    if place == "appended":
        data.append(0)
    elif place == "cut":
        del data[-1]
    else:
        data[{"first": 0, "middle": len(data) // 2, "last": -1}[place]] ^= 1
    model.write_bytes(data)
    assert not verifies(model, found["key"] + ".pub")


def test_a_changed_signature_is_refused(chain: str, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The statement and the signature are covered: a bundle put together from two models' holds for neither."""
    model = out / "m.safetensors"
    _, found = export(capsys, chain, model)
    true = json.loads((out / "model.sig").read_text())
    key = oms_key.load_or_create(None, chain_folder=None)
    other = oms.bundle("m.safetensors", bytes(32), key)
    for mixed in (
        {**true, "dsseEnvelope": {**true["dsseEnvelope"], "payload": other["dsseEnvelope"]["payload"]}},
        {**true, "dsseEnvelope": {**true["dsseEnvelope"], "signatures": other["dsseEnvelope"]["signatures"]}},
        other,
    ):
        (out / "model.sig").write_text(json.dumps(mixed))
        assert not verifies(model, found["key"] + ".pub")
    (out / "model.sig").write_text(json.dumps(true))
    assert verifies(model, found["key"] + ".pub")


@pytest.mark.parametrize("content", [b"", b"notes", b"{}", b"[" * 100_000, b'{"dsseEnvelope":{"payload":"e30="}}'])
def test_a_signature_of_something_else_is_not_replaced(
    chain: str, out: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is called model.sig and does not sign this file stays, and nothing is exported."""
    (out / "model.sig").write_bytes(content)
    code, found = export(capsys, chain, out / "m.safetensors")
    assert (code, found["error"]["kind"]) == (2, "signature_exists")
    assert (out / "model.sig").read_bytes() == content
    assert [item.name for item in out.iterdir()] == ["model.sig"]


def test_two_models_do_not_share_a_signature(chain: str, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second export into one folder is refused: the first one's signature would be lost."""
    _, found = export(capsys, chain, out / "a.safetensors")
    assert export(capsys, chain, out / "b.safetensors")[0] == 2
    assert verifies(out / "a.safetensors", found["key"] + ".pub")


EC_KEY = pem(ec.generate_private_key(ec.SECP256R1()))


@pytest.mark.parametrize(
    ("data", "mode", "kind"),
    [
        (pem(ed25519.Ed25519PrivateKey.generate()), 0o600, "key_malformed"),
        (pem(ec.generate_private_key(ec.SECP256K1())), 0o600, "key_malformed"),
        (pem(ec.generate_private_key(ec.SECP256R1()), BestAvailableEncryption(b"x")), 0o600, "key_malformed"),
        (b"", 0o600, "key_malformed"),
        (bytes(20_000), 0o600, "key_malformed"),
        (EC_KEY, 0o640, "key_exposed"),
        (EC_KEY, 0o604, "key_exposed"),
    ],
    ids=["ed25519", "another curve", "encrypted", "empty", "large", "group", "others"],
)
def test_a_key_that_will_not_do_is_refused(tmp_path: Path, data: bytes, mode: int, kind: str) -> None:
    """Another algorithm, a password, garbage, or a file that others may read: refused, and the message is no secret."""
    path = key_file(tmp_path / "key.pem", data, mode)
    with pytest.raises(UsageError) as caught:
        oms_key.load_or_create(path, chain_folder=None)
    assert caught.value.kind == kind
    assert "BEGIN" not in str(caught.value)


def test_keys_lie_outside_chains(chain: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key inside the chain is refused, by its path, through a link, and where it would be made."""
    inside = Path(chain) / "key.pem"
    key_file(inside, EC_KEY)
    (tmp_path / "link.pem").symlink_to(inside)
    for path in (inside, tmp_path / "link.pem"):
        with pytest.raises(UsageError) as caught:
            oms_key.load_or_create(path, chain_folder=chain)
        assert caught.value.kind == "key_in_chain"
    inside.unlink()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(Path(chain) / "config"))
    with pytest.raises(UsageError) as caught:
        oms_key.load_or_create(None, chain_folder=chain)
    assert caught.value.kind == "key_in_chain"
    assert not (Path(chain) / "config").exists()


def test_a_named_key_is_never_made(tmp_path: Path, chain: str, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A key file that is not there is an error, as is a key without --oms; nothing is written."""
    code, found = export(capsys, chain, out / "m.safetensors", "--oms-key", str(tmp_path / "no.pem"))
    assert (code, found["error"]["kind"]) == (2, "key_unreadable")
    assert main(["export", chain, "latest", str(out / "m.safetensors"), "--oms-key", "x"]) == 2
    assert not list(out.iterdir())
    assert not (tmp_path / "no.pem").exists()


def test_what_cannot_be_signed_is_a_typed_error(out: Path) -> None:
    """A file that is gone, or a folder in the signature's place: an error that names it, and nothing half written."""
    key = oms_key.load_or_create(None, chain_folder=None)
    with pytest.raises(StoreError) as caught:
        oms.sign(out / "gone.safetensors", key)
    assert caught.value.kind == "export_failed"
    (out / "model.sig").mkdir()
    (out / "m.safetensors").write_bytes(b"x")
    with pytest.raises(StoreError) as caught:
        oms.sign(out / "m.safetensors", key)
    assert sorted(item.name for item in out.iterdir()) == ["m.safetensors", "model.sig"]


def test_the_key_is_shown_by_nothing() -> None:
    """Neither repr nor str of a key holds its secret."""
    key = oms_key.load_or_create(None, chain_folder=None)
    assert "private" not in repr(key)
    assert str(key.private.private_numbers().private_value) not in repr(key)
