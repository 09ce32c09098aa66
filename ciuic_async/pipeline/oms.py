"""OpenSSF Model Signing v1.0 for an exported file: a signature that its official tools verify.

``model.sig`` is a sigstore bundle: a DSSE envelope around an in-toto statement, which holds the file's SHA-256. It
proves that whoever has the key made this file; what the chain proves (when, and as which snapshot) stays in the chain.
The format knows ECDSA keys (``oms_key.py``), not the Ed25519 keys that sign chains.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
from contextlib import suppress
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from ciuic_async.errors import StoreError, UsageError
from ciuic_async.pipeline.oms_key import OmsKey

SIGNATURE = "model.sig"
"""The name that the official tools look for."""

_BUNDLE_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_PAYLOAD_TYPE = "application/vnd.in-toto+json"
_STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
_PREDICATE_TYPE = "https://model_signing/signature/v1.0"
_HASHES: dict[int, type[hashes.HashAlgorithm]] = {256: hashes.SHA256, 384: hashes.SHA384, 521: hashes.SHA512}
_LIMIT_BYTES = 1 << 20


def sign(path: Path, key: OmsKey) -> Path:
    """Write ``model.sig`` beside the file at ``path``; durable on return, there whole or not at all.

    Raises:
        UsageError: kind ``signature_exists``: a ``model.sig`` of something else is there.
        StoreError: kind ``export_failed``; the file cannot be read, or its signature not written.
    """
    target = check_target(path)
    try:
        with path.open("rb") as file:
            digest = file_digest(file, "sha256").digest()
        _write(target, json.dumps(bundle(path.name, digest, key), indent=2).encode() + b"\n")
    except OSError as error:
        raise StoreError(
            f"{target}: cannot sign the export: {os.strerror(error.errno or 0)}",
            kind="export_failed",
            where=str(target),
        ) from error
    return target


def check_target(path: Path) -> Path:
    """Where the signature of the file at ``path`` goes. Raises UsageError, kind ``signature_exists``, as ``sign``."""
    target = path.with_name(SIGNATURE)
    try:
        with target.open("rb") as file:
            data = file.read(_LIMIT_BYTES)
    except FileNotFoundError:
        return target
    except OSError as error:
        raise StoreError(
            f"{target}: cannot be looked at: {os.strerror(error.errno or 0)}", kind="export_failed", where=str(target)
        ) from error
    try:
        found = json.loads(base64.b64decode(json.loads(data)["dsseEnvelope"]["payload"]))["subject"][0]["name"]
    except (ValueError, LookupError, TypeError, RecursionError):
        found = None
    if found != path.name:
        raise UsageError(
            f"{target}: is there already and does not sign {path.name}; export into another folder, or remove it",
            kind="signature_exists",
            where=str(target),
        )
    return target


def bundle(name: str, digest: bytes, key: OmsKey) -> dict[str, Any]:
    """The bundle for a model that is one file.

    Args:
        name: the file's; for information, renaming the file breaks nothing.
        digest: its SHA-256.
    """
    resource = {"name": ".", "algorithm": "sha256", "digest": digest.hex()}
    statement = {
        "_type": _STATEMENT_TYPE,
        # The subject's digest is one over the digests of all resources in their order.
        "subject": [{"name": name, "digest": {"sha256": sha256(digest).hexdigest()}}],
        "predicateType": _PREDICATE_TYPE,
        "predicate": {
            "serialization": {"method": "files", "hash_type": "sha256", "allow_symlinks": False},
            "resources": [resource],
        },
    }
    payload = json.dumps(statement).encode()
    algorithm = _HASHES[key.private.curve.key_size]()
    signature = key.private.sign(_signed_bytes(payload), ec.ECDSA(algorithm))
    return {
        "mediaType": _BUNDLE_TYPE,
        "verificationMaterial": {
            "publicKey": {"hint": sha256(key.public_pem).hexdigest()},
            "tlogEntries": [],
        },
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": _PAYLOAD_TYPE,
            "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
        },
    }


def _signed_bytes(payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding: type and payload, each behind its length."""
    return b"DSSEv1 %d %s %d %s" % (len(_PAYLOAD_TYPE), _PAYLOAD_TYPE.encode(), len(payload), payload)


def _write(path: Path, data: bytes) -> None:
    """A temporary file beside the target, fsync, rename."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise
