"""The JSON file of ``CiuicSnapshotChain(config_path)``: read, checked key by key, and turned into what a chain takes.

Secrets are in ``storage_options`` alone, which no ``repr`` and no error shows.
"""

from __future__ import annotations

import difflib
import json
import os
import stat
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from dataclasses import replace as replaced
from typing import Any
from urllib.parse import urlsplit

from ciuic_async.arguments import check_choice
from ciuic_async.errors import CiuicWarning, UsageError
from ciuic_async.retention.parse import parse_policy
from ciuic_async.retention.policy import Policy as Retention
from ciuic_async.transparency.policy import Policy, read_text_file

STORAGE_TYPES = ("local", "s3", "minio", "hdfs", "gcs", "azure")
COMPRESSIONS = ("auto", "smallest", "raw")
_SCHEMES = {"s3": "s3", "minio": "s3", "gcs": "gs", "azure": "az"}
_LIMIT_BYTES = 1 << 20
_TEXT, _WHOLE, _TABLE, _TEXTS = "a text", "a whole number above 0", "an object", "a text or a list of texts"
KEYS = {
    "storage_type": _TEXT,
    "bucket_name": _TEXT,
    "access_key": _TEXT,
    "secret_key": _TEXT,
    "blockchain_endpoint": _TEXT,
    "witness_key": _TEXT,
    "endpoint": _TEXT,
    "prefix": _TEXT,
    "region": _TEXT,
    "compression": _TEXT,
    "interval": _WHOLE,
    "retention": _TEXTS,
    "ordering": _TEXT,
    "trust": _TABLE,
}
"""Every key, and what its value is."""
_SECRET = ("access_key", "secret_key")


@dataclass(frozen=True, slots=True)
class Config:
    """A checked file.

    Attributes:
        url: where the chain is.
        storage_options: how to get there, by the names of the object store's client; secrets are in here.
        compression, retention: None where the file says nothing: then environment and ``ciuic.toml`` count.
        trust: for ``SnapshotChain``; with a parsed policy.
        asks: whether the policy has a witness that can be asked.
    """

    url: str
    compression: str | None = None
    interval: int = 10
    retention: Retention | None = None
    ordering: str | None = None
    trust: dict[str, object] | None = None
    asks: bool = False
    storage_options: dict[str, str] = field(default_factory=dict, repr=False)

    @property
    def policy(self) -> Policy | None:
        """The policy of ``trust``."""
        found = None if self.trust is None else self.trust["policy"]
        return found if isinstance(found, Policy) else None


def load_config(path: str | os.PathLike[str]) -> Config:
    """Read and check a file. Nothing is contacted. Warns of secrets that others can read.

    Raises:
        UsageError: kind ``bad_config``; names the file, the key, what was expected and found.
    """
    name = os.fspath(path)
    data = read_text_file(name, _LIMIT_BYTES, "configuration")
    values = _parsed(data, name)
    _check_types(values, name)
    if any(key in values for key in _SECRET):
        _warn_of_readers(name)
    storage = values.get("storage_type", "local")
    _choice(name, "storage_type", storage, STORAGE_TYPES)
    compression = values.get("compression")
    if compression is not None:
        _choice(name, "compression", compression, COMPRESSIONS)
    trust = _trust(values, name)
    policy = None if trust is None else trust["policy"]
    return Config(
        url=_url(storage, values, name),
        compression=compression,
        interval=values.get("interval", 10),
        retention=_retention(values.get("retention"), name),
        ordering=values.get("ordering"),
        trust=trust,
        asks=isinstance(policy, Policy) and any(witness.url for witness in policy.witnesses),
        storage_options=_options(storage, values, name),
    )


def _error(name: str, message: str) -> UsageError:
    return UsageError(f"{name}: {message}", kind="bad_config", where=name)


def _parsed(data: bytes, name: str) -> dict[str, Any]:
    if len(data) > _LIMIT_BYTES:
        raise _error(name, f"longer than {_LIMIT_BYTES} bytes, expected a small JSON object")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a key is there twice")
        return dict(pairs)

    try:
        found = json.loads(data, object_pairs_hook=unique)
    except json.JSONDecodeError as error:  # its message holds no value
        raise _error(name, f"no JSON: {error.msg} at line {error.lineno}") from None
    except (ValueError, RecursionError):
        raise _error(name, "no JSON of plain text, or a key is there twice") from None
    if not isinstance(found, dict):
        raise _error(name, f"expected a JSON object, found {_kind(found)}")
    return found


def _check_types(values: Mapping[str, Any], name: str) -> None:
    for key, value in values.items():
        if key not in KEYS:
            near = difflib.get_close_matches(key[:40], KEYS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"keys are {', '.join(KEYS)}"
            raise _error(name, f"unknown key {key[:80]!r}; {hint}")
        expected = KEYS[key]
        fits = {
            _TEXT: isinstance(value, str) and value != "",
            _WHOLE: type(value) is int and value > 0,
            _TABLE: isinstance(value, dict),
            _TEXTS: isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, str) for v in value)),
        }[expected]
        if not fits:
            shown = "" if key in _SECRET or not isinstance(value, int | float | str) else f" {value!r:.80}"
            raise _error(name, f"{key}: expected {expected}, found {_kind(value)}{shown}")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


def _choice(name: str, key: str, value: str, choices: tuple[str, ...]) -> None:
    try:
        check_choice(key, value, choices)
    except UsageError as error:
        raise _error(name, str(error)) from None


def _warn_of_readers(name: str) -> None:
    """A secret that others may read is none."""
    mode = os.stat(name).st_mode
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        warnings.warn(
            f"{name}: holds credentials and others can read it (mode {stat.S_IMODE(mode):o}); run: chmod 600 on it, or "
            "leave them out and set them in the environment",
            CiuicWarning,
            stacklevel=5,
        )


# --- where ------------------------------------------------------------------------------------------------------------


def _need(values: Mapping[str, Any], key: str, storage: str, name: str) -> str:
    if key not in values:
        raise _error(name, f"storage_type {storage!r} needs the key {key!r}")
    value: str = values[key]
    return value


def _url(storage: str, values: Mapping[str, Any], name: str) -> str:
    bucket, prefix = _need(values, "bucket_name", storage, name), values.get("prefix", "").strip("/")
    if storage == "local":
        return os.path.join(bucket, prefix) if prefix else bucket
    if storage == "hdfs":
        endpoint = _need(values, "endpoint", storage, name).removeprefix("hdfs://").rstrip("/")
        return "/".join(filter(None, (f"hdfs://{endpoint}", bucket.strip("/"), prefix)))
    return "/".join(filter(None, (f"{_SCHEMES[storage]}://{bucket}", prefix)))


def _options(storage: str, values: Mapping[str, Any], name: str) -> dict[str, str]:
    """What the object store's client is told, by its own names."""
    credentials = {key: values[key] for key in _SECRET if key in values}
    if storage in ("local", "hdfs"):
        if credentials:
            raise _error(name, f"storage_type {storage!r} has no {' and '.join(credentials)}; remove them")
        return {}
    if storage == "minio":
        _need(values, "endpoint", storage, name)
    names = {"region": "region", "endpoint": "endpoint"}
    if storage in ("s3", "minio"):
        names |= {"access_key": "access_key_id", "secret_key": "secret_access_key"}
    elif storage == "azure":
        names |= {"access_key": "account_name", "secret_key": "account_key"}
    else:
        if "access_key" in values:
            raise _error(name, "storage_type 'gcs' has no access_key; secret_key is the path of a service account file")
        names |= {"secret_key": "service_account"}
    options = {theirs: values[ours] for ours, theirs in names.items() if ours in values}
    if storage == "minio":
        options.setdefault("region", "us-east-1")  # what such servers answer to if nobody told them another
    if options.get("endpoint", "").startswith("http://"):
        options["allow_http"] = "true"
    return options


# --- what stays, whose word counts ------------------------------------------------------------------------------------


def _retention(value: Any, name: str) -> Retention | None:
    if value is None:
        return None
    try:
        return parse_policy(value if isinstance(value, str) else "|".join(value))
    except UsageError as error:
        raise _error(name, f"retention: {error}") from None


def _trust(values: Mapping[str, Any], name: str) -> dict[str, object] | None:
    """The option ``trust`` of a chain, from the keys ``trust``, ``blockchain_endpoint`` and ``witness_key``."""
    endpoint, key = values.get("blockchain_endpoint"), values.get("witness_key")
    trust: dict[str, object] = dict(values.get("trust", {}))
    if endpoint is not None and not _is_http(endpoint):
        shown = "one with a user in it" if "@" in endpoint else f"{endpoint!r:.80}"
        raise _error(name, f"blockchain_endpoint: expected http://host:port, found {shown}")
    if key is not None:
        if "policy" in trust or endpoint is None:
            raise _error(name, "witness_key: goes with a blockchain_endpoint, and without a policy in trust")
        trust["policy"] = Policy.parse(f"witness endpoint {key} {endpoint}\nquorum endpoint\n".encode(), name)
    elif "policy" in trust:
        trust["policy"] = _with_endpoint(_policy(trust["policy"]), endpoint, name)
    elif endpoint is not None:
        warnings.warn(
            f"{name}: blockchain_endpoint is not asked for signatures: nobody said whose count. Add witness_key, the "
            "line that 'ciuic chain witness' prints as vkey, or a policy in trust",
            CiuicWarning,
            stacklevel=5,
        )
    if trust and "policy" not in trust:
        raise _error(name, "trust: expected a 'policy', or a blockchain_endpoint with its witness_key")
    return trust or None


def _is_http(url: str) -> bool:
    try:
        parts = urlsplit(url)
    except ValueError:  # brackets that are no address
        return False
    return parts.scheme in ("http", "https") and bool(parts.netloc)


def _policy(value: object) -> Policy:
    if isinstance(value, str) and "\n" in value:
        return Policy.parse(value.encode())
    return Policy.load(str(value))


def _with_endpoint(policy: Policy, endpoint: str | None, name: str) -> Policy:
    """The endpoint is where the policy's witness is, if the policy itself does not say."""
    if endpoint is None:
        return policy
    silent = [witness for witness in policy.witnesses if witness.url is None]
    if not silent:
        return policy
    if len(silent) > 1:
        raise _error(name, f"blockchain_endpoint: the policy has {len(silent)} witnesses without a URL, expected one")
    witnesses = tuple(replaced(w, url=endpoint) if w is silent[0] else w for w in policy.witnesses)
    return replaced(policy, witnesses=witnesses)
