"""From a URL, options, the environment and profile files to a client of an object store.

Order: what ``storage_options`` says, then the environment, then the profile of ``~/.aws``; what none of them says is
left to the client, which knows instance roles. Values never appear in an error: only the names of options do.
"""

from __future__ import annotations

import configparser
import difflib
import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ciuic_async.errors import UsageError

SCHEMES = ("s3", "gs", "az")
_URL = re.compile(r"(s3|gs|az)://([A-Za-z0-9][A-Za-z0-9._-]{1,62})(?:/([A-Za-z0-9 !$&'()+,./:;=@_-]*))?", re.ASCII)
_FILE_LIMIT_BYTES = 1 << 20
_TIMES = {"connect_timeout": "5", "timeout": "60", "retry_timeout": "60"}
"""Seconds: to connect; for one request with its body, at most 16 MiB; after which nothing is tried again."""
_SWITCHES = ("allow_http", "allow_invalid_certificates")
_CLIENT_TEXTS = ("proxy_url", "proxy_ca_certificate", "user_agent")
_ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_KEYS = ("access_key_id", "secret_access_key", "session_token")
_KNOWN = [
    *(
        "access_key_id",
        "secret_access_key",
        "session_token",
        "profile",
        "region",
        "endpoint",
        "virtual_hosted_style_request",
    ),
    *("checksum_algorithm", "server_side_encryption", "sse_kms_key_id", "skip_signature"),
    *(
        "unsigned_payload",
        "disable_bulk_delete",
        "request_payer",
        "s3_express",
        "service_account",
        "service_account_key",
        "account_name",
    ),
    *("account_key", "sas_key", "client_id", "client_secret", "tenant_id", *_TIMES, *_SWITCHES, *_CLIENT_TEXTS),
]
"""For suggestions; the client knows more."""
_PROFILE_KEYS = {
    "aws_access_key_id": "access_key_id",
    "aws_secret_access_key": "secret_access_key",
    "aws_session_token": "session_token",
    "region": "region",
    "endpoint_url": "endpoint",
}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a chain lives in an object store."""

    scheme: str
    bucket: str
    prefix: str

    @property
    def url(self) -> str:
        """Without credentials: a URL that has them is refused."""
        return f"{self.scheme}://{self.bucket}" + (f"/{self.prefix}" if self.prefix else "")


@dataclass(frozen=True, slots=True)
class Settings:
    """What a client is made of. Its repr shows no values."""

    config: dict[str, str] = field(repr=False)
    """For the client's own constructor, by its names."""
    client: dict[str, Any] = field(repr=False)
    endpoint: str
    """As the configuration names it; empty: the cloud's own."""
    retry_timeout_s: float

    def take_keys(self) -> dict[str, Any] | None:
        """The S3 keys among the options, taken out of them, as the client's provider of credentials returns them.

        Given so, they are all that is used: in its options the client would add a token from the environment.
        """
        if "access_key_id" not in self.config or "secret_access_key" not in self.config:
            return None
        key, secret, token = (self.config.pop(name, None) for name in _KEYS)
        return {"access_key_id": key, "secret_access_key": secret, "token": token, "expires_at": None}


def parse_url(url: str) -> Place:
    """``s3://bucket/prefix`` and the same with ``gs`` and ``az``.

    Raises:
        UsageError: kind ``bad_url``; the URL is not repeated where it may hold a password.
    """
    scheme = url.partition("://")[0].lower()
    rest = url.partition("://")[2]
    if "@" in rest.partition("/")[0] or "?" in rest or "#" in rest:
        raise UsageError(
            f"{scheme}://...: a URL with user, password, '?' or '#': credentials and options belong into the "
            "environment, a profile or storage_options",
            kind="bad_url",
        )
    match = _URL.fullmatch(f"{scheme}://{rest}")
    prefix = (match[3] or "").strip("/") if match else ""
    if match is None or any(part in ("", ".", "..") for part in prefix.split("/") if prefix):
        raise UsageError(
            f"{scheme}://{rest[:200]!a}: expected {scheme}://bucket/prefix of letters, digits and -_.=+, without "
            "empty parts",
            kind="bad_url",
        )
    return Place(scheme, match[2], prefix)


def settings(place: Place, options: Mapping[str, str] | None) -> Settings:
    """What ``storage_options``, the environment and profiles say for a place.

    Raises:
        UsageError: kind ``bad_storage_option``: a value that is none; kind ``insecure_endpoint``: http to another
            machine without ``allow_http``; kind ``bad_profile``.
    """
    given = {str(key).lower().removeprefix("aws_"): _text(key, value) for key, value in (options or {}).items()}
    times = {name: _seconds(name, given.pop(name, default)) for name, default in _TIMES.items()}
    client: dict[str, Any] = {name: timedelta(seconds=times[name]) for name in ("connect_timeout", "timeout")}
    for name in _SWITCHES:
        if name in given:
            client[name] = _switch(name, given.pop(name))
    for name in _CLIENT_TEXTS:
        if name in given:
            client[name] = given.pop(name)
    if "bucket" in given or "container_name" in given:
        raise UsageError("storage_options: the bucket is what the URL names", kind="bad_storage_option")
    if "endpoint_url" in given:
        given["endpoint"] = given.pop("endpoint_url")
    if place.scheme == "s3":
        given = _s3(given)
    endpoint = given.get("endpoint", "")
    if place.scheme == "s3" and endpoint:
        # Under the name that wins over all others: the client reads the environment by itself, too.
        given["aws_endpoint_url_s3"] = given.pop("endpoint")
    if "allow_http" not in client and os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true"):
        client["allow_http"] = True
    _check_endpoint(endpoint, client)
    return Settings(given, client, endpoint, times["retry_timeout"])


def _s3(given: dict[str, str]) -> dict[str, str]:
    """Fill in what the environment or a profile says. Keys come all from one source: halves of two fit nothing."""
    if any(name in given for name in _KEYS):
        # The client would take the other half from the environment.
        missing = [name for name in _KEYS[:2] if name not in given]
        if missing:
            raise UsageError(
                f"storage_options: {' and '.join(missing)} is missing: give all keys, or none and a profile",
                kind="bad_storage_option",
            )
    found = dict(given)
    wanted = found.pop("profile", None)
    profile = _profile(wanted or os.environ.get("AWS_PROFILE"))
    keys_are_given = "access_key_id" in found or "skip_signature" in found
    if wanted is None and os.environ.get("AWS_ACCESS_KEY_ID"):
        keys_are_given = True  # in the environment, where the client finds them
    endpoint = next((os.environ[name] for name in _ENDPOINT_VARIABLES if os.environ.get(name)), None)
    if endpoint is not None:
        found.setdefault("endpoint", endpoint)
    in_environment = any(os.environ.get(name) for name in ("AWS_REGION", "AWS_DEFAULT_REGION"))
    for name, value in profile.items():
        if not (name in _KEYS and keys_are_given) and not (name == "region" and in_environment):
            found.setdefault(name, value)
    return found


def _profile(wanted: str | None) -> dict[str, str]:
    """What ``~/.aws/credentials`` and ``~/.aws/config`` say of a profile."""
    name = wanted or "default"
    found: dict[str, str] = {}
    for variable, default, section in (
        ("AWS_CONFIG_FILE", "~/.aws/config", name if name == "default" else f"profile {name}"),
        ("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials", name),
    ):
        parser = _read(Path(os.environ.get(variable) or default).expanduser())
        if parser is not None and parser.has_section(section):
            found |= {_PROFILE_KEYS[key]: value for key, value in parser[section].items() if key in _PROFILE_KEYS}
    if wanted and not found:
        raise UsageError(f"there is no profile {wanted[:64]!r} with keys in ~/.aws", kind="bad_profile")
    return found


def _read(path: Path) -> configparser.RawConfigParser | None:
    # No default section and no interpolation: secrets may hold any character.
    parser = configparser.RawConfigParser(default_section="\0", strict=False)
    try:
        with path.open("rb") as file:
            data = file.read(_FILE_LIMIT_BYTES + 1)
    except OSError:
        return None
    try:
        if len(data) > _FILE_LIMIT_BYTES:
            raise ValueError
        parser.read_string(data.decode())
    except (configparser.Error, ValueError):
        parser = None  # type: ignore[assignment]
    if parser is None:  # outside of the handler: the parser's message quotes lines
        raise UsageError(f"{path}: is no AWS profile file", kind="bad_profile")
    return parser


def _check_endpoint(endpoint: str, client: dict[str, Any]) -> None:
    if not endpoint:
        return
    try:
        parts = urlsplit(endpoint)
        host, scheme, _ = parts.hostname, parts.scheme, parts.port
    except ValueError:
        host, scheme = None, ""
    if not host or scheme not in ("http", "https") or any(mark in endpoint for mark in "@?#"):
        raise UsageError(
            "the endpoint is no URL: expected https://host[:port] without user, password or '?'", kind="bad_endpoint"
        )
    if scheme == "http" and "allow_http" not in client and _is_loopback(host):
        client["allow_http"] = True
    if scheme == "http" and not client.get("allow_http"):
        raise UsageError(
            f"http://{host}: everybody on the way can read and change what is sent: use https, or say "
            "storage_options={'allow_http': 'true'}",
            kind="insecure_endpoint",
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def refused(error: Exception, place: Place) -> UsageError:
    """For what the client says about its options. Its message is not passed on: it repeats values.

    Raise it outside of the ``except`` block.
    """
    text = str(error)
    unknown = re.search(r"Configuration key: '([A-Za-z0-9_]{1,64})' is not valid", text)
    if unknown:
        near = difflib.get_close_matches(unknown[1], _KNOWN, 1)
        said = f"{unknown[1]!r} is not an option of this store" + (f"; did you mean {near[0]!r}?" if near else "")
    else:
        missing = re.search(r"Missing ([A-Za-z]{1,40})|(Account) must be specified", text)
        said = f"{missing[1] or missing[2]} is missing" if missing else "an option's value cannot be used"
    return UsageError(f"{place.url}: storage_options or the environment: {said}", kind="bad_storage_option")


def _text(key: object, value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return str(value)
    if not isinstance(value, str) or "\n" in value or "\0" in value:
        raise UsageError(f"storage_options: {str(key)[:64]!r} is not a line of text", kind="bad_storage_option")
    return value


def _switch(name: str, value: str) -> bool:
    if value.lower() not in ("true", "false", "1", "0"):
        raise UsageError(f"storage_options: {name} is 'true' or 'false'", kind="bad_storage_option")
    return value.lower() in ("true", "1")


def _seconds(name: str, value: str) -> float:
    try:
        seconds = float(value.strip().removesuffix("s"))
    except ValueError:
        seconds = -1.0
    if not 0 < seconds <= 3600:
        raise UsageError(f"storage_options: {name} is a number of seconds, at most 3600", kind="bad_storage_option")
    return seconds
