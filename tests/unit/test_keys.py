"""Where the signing key comes from, and what is refused."""

from __future__ import annotations

import base64
import errno
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from ciuic_async.errors import CiuicWarning, UsageError
from ciuic_async.transparency import keys
from ciuic_async.transparency.keys import SigningKey

SECRET = "ED25519-SECRET+" + base64.b64encode(bytes(range(32))).decode()
ORIGIN = "ciuic.dev/chain/test"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own, without a key in the environment."""
    monkeypatch.delenv("CIUIC_KEY", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config"


def same(first: SigningKey | None, second: SigningKey | None) -> bool:
    return first is not None and second is not None and first.vkey(ORIGIN) == second.vkey(ORIGIN)


def test_the_users_key_is_made_once_for_its_owner_only(home: Path) -> None:
    """Nothing is found before; the first call makes file 0600 in folder 0700, later ones find the same key."""
    assert keys.find(None, chain_folder=None) is None
    assert not home.exists()
    key = keys.load_or_create(None, chain_folder=None)
    path = home / "ciuic_async" / "keys" / "ed25519.key"
    assert key.path == str(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [item.name for item in path.parent.iterdir()] == ["ed25519.key"]
    assert same(keys.load_or_create(None, chain_folder=None), key)
    assert same(keys.find(None, chain_folder=None), key)


def test_order_explicit_then_environment_then_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An explicit key wins over CIUIC_KEY, which wins over the user's file; both may be a path or the secret."""
    user = keys.load_or_create(None, chain_folder=None)
    monkeypatch.setenv("CIUIC_KEY", str(tmp_path / "env.key"))
    from_environment = keys.load_or_create(None, chain_folder=None)
    assert from_environment.path == str(tmp_path / "env.key")
    assert not same(user, from_environment)
    monkeypatch.setenv("CIUIC_KEY", SECRET + "\n")
    secret = keys.load_or_create(None, chain_folder=None)
    assert secret.path is None
    assert same(secret, SigningKey.from_secret(SECRET))
    explicit = keys.load_or_create(tmp_path / "new" / "explicit.key", chain_folder=None)
    assert same(keys.find(str(tmp_path / "new" / "explicit.key"), chain_folder=None), explicit)
    assert not same(explicit, secret)
    assert same(keys.load_or_create(SECRET, chain_folder=None), secret)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o660, 0o644])
def test_a_key_that_others_can_reach_is_refused(tmp_path: Path, mode: int) -> None:
    """Any right of group or others on a key file is a UsageError, also when only looking."""
    path = tmp_path / "key"
    keys.load_or_create(path, chain_folder=None)
    path.chmod(mode)
    for call in (keys.load_or_create, keys.find):
        with pytest.raises(UsageError) as caught:
            call(path, chain_folder=None)
        assert caught.value.kind == "key_exposed"


def test_a_key_inside_the_chain_is_refused(tmp_path: Path) -> None:
    """A key in the chain's folder, directly or through a link either way, is neither made nor used."""
    chain = tmp_path / "chain"
    chain.mkdir()
    (tmp_path / "alias").symlink_to(chain)
    inside = chain / "key"
    for path in (inside, tmp_path / "alias" / "key", chain / "sub" / ".." / "key"):
        with pytest.raises(UsageError) as caught:
            keys.load_or_create(path, chain_folder=str(chain))
        assert caught.value.kind == "key_in_chain"
    assert list(chain.iterdir()) == []
    keys.load_or_create(inside, chain_folder=None)
    (tmp_path / "link").symlink_to(inside)
    with pytest.raises(UsageError) as caught:
        keys.find(tmp_path / "link", chain_folder=str(tmp_path / "alias"))
    assert caught.value.kind == "key_in_chain"


@pytest.mark.parametrize(
    "content",
    ["", "\n", "x", SECRET[:-1], SECRET + "\n\n", SECRET + "\n" + SECRET, " " + SECRET, SECRET[15:],
     "ED25519-SECRET+" + base64.b64encode(bytes(31)).decode(), SECRET[:-2] + "9="],
)  # fmt: skip
def test_garbage_is_refused_and_never_shown(tmp_path: Path, content: str) -> None:
    """A key file that is not exactly one secret is refused, and the message does not hold what the file held."""
    path = tmp_path / "key"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(UsageError) as caught:
        keys.load_or_create(path, chain_folder=None)
    assert caught.value.kind == "key_malformed"
    assert SECRET[15:40] not in str(caught.value)


@pytest.mark.parametrize("secret", [SECRET[15:], SECRET[:-3], SECRET.replace("ED25519", "ed25519"), "x" + SECRET])
def test_a_mistyped_secret_is_not_taken_for_a_path(secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What looks like a secret but is none is refused: no file of that name, and no message with it."""
    for explicit in (secret, None):
        monkeypatch.setenv("CIUIC_KEY", secret)
        with pytest.raises(UsageError) as caught:
            keys.load_or_create(explicit, chain_folder=None)
        assert caught.value.kind == "key_malformed"
        assert SECRET[15:40] not in str(caught.value)


def test_links_that_loop_or_lead_nowhere_folders_and_pipes_are_refused(tmp_path: Path) -> None:
    """None of them is read, followed into a new file, or waited for."""
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe", 0o600)
    kinds = []
    for name in ("loop", "dangling", "folder", "pipe"):
        with pytest.raises(UsageError) as caught:
            keys.load_or_create(tmp_path / name, chain_folder=None)
        kinds.append(caught.value.kind)
    assert kinds == ["key_unreadable", "key_unreadable", "key_malformed", "key_malformed"]
    assert not (tmp_path / "nowhere").exists()


def test_a_home_that_cannot_be_written_gives_a_key_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the user's file cannot be made there is a warning and a key; an explicit path there is an error."""
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file"))
    with pytest.warns(CiuicWarning, match="kept in memory"):
        key = keys.load_or_create(None, chain_folder=None)
    assert key.path is None
    with pytest.raises(UsageError):
        keys.load_or_create(tmp_path / "file" / "key", chain_folder=None)


def test_racing_processes_end_with_one_key(tmp_path: Path) -> None:
    """Four processes that make the user's key at once all come back with the same key."""
    code = (
        "import sys; from ciuic_async.transparency import keys; sys.stdin.read(1);"
        "print(keys.load_or_create(sys.argv[1], chain_folder=None).vkey('n'))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "keys" / "key")]
    started = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    answers = {process.communicate("x")[0] for process in started}
    assert len(answers) == 1
    assert answers == {keys.load_or_create(tmp_path / "keys" / "key", chain_folder=None).vkey("n") + "\n"}


def test_a_key_does_not_show_its_secret() -> None:
    """repr and the attributes that are not private hold no secret; a name that cannot be a key's is refused."""
    key = SigningKey.from_secret(SECRET)
    assert SECRET[15:40] not in repr(key)
    assert bytes(range(32)).hex() not in repr(key)
    with pytest.raises(UsageError):
        key.vkey("two words")
    with pytest.raises(ValueError, match="ends in LF"):
        key.sign("a", "no newline")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert key.sign("a", "text\n") == key.sign("a", "text\n")


def test_without_a_home_there_is_a_key_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without a home folder has no key file: looking finds none, signing warns and signs all the same."""
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")
    monkeypatch.setenv("HOME", "relative")
    assert keys.find(None, chain_folder=None) is None
    with pytest.warns(CiuicWarning, match="no home folder.*kept in memory"):
        assert keys.load_or_create(None, chain_folder=None).path is None


def test_a_relative_xdg_folder_counts_as_unset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the XDG specification asks: the key is looked for in ~/.config, not below wherever the process runs."""
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    key = keys.load_or_create(None, chain_folder=None)
    assert key.path == str(tmp_path / "home" / ".config" / "ciuic_async" / "keys" / "ed25519.key")
    assert same(keys.find(None, chain_folder=None), key)


def test_the_users_own_key_is_refused_like_any_other(home: Path) -> None:
    """A user's key that others can read is an error, and never quietly replaced by one in memory."""
    path = keys.load_or_create(None, chain_folder=None).path
    assert path is not None
    os.chmod(path, 0o644)
    for call in (keys.load_or_create, keys.find):
        with pytest.raises(UsageError) as caught:
            call(None, chain_folder=None)
        assert caught.value.kind == "key_exposed"


def test_looking_for_a_secret_that_is_given_finds_it() -> None:
    """A secret needs no file: looking gives the same key as making."""
    assert same(keys.find(SECRET, chain_folder=None), keys.load_or_create(SECRET, chain_folder=None))


@pytest.mark.parametrize("explicit", ["", "a\0b"])
def test_what_can_be_no_path_is_refused(explicit: str) -> None:
    """An empty text and one with a NUL name no file and are no secret."""
    for call in (keys.load_or_create, keys.find):
        with pytest.raises(UsageError) as caught:
            call(explicit, chain_folder=None)
        assert caught.value.kind == "key_malformed"


@pytest.fixture
def strangers_folder() -> Iterator[Path]:
    """A folder of a user who owns nothing else, with that user's rights: no mode keeps root out, as whom tests may run.

    Not below ``tmp_path``, which others cannot reach.
    """
    folder = Path(tempfile.mkdtemp(prefix="ciuic-stranger-"))
    is_root = os.geteuid() == 0
    try:
        if is_root:
            os.chown(folder, 65534, 65534)
            os.seteuid(65534)
        yield folder
    finally:
        if is_root:
            os.seteuid(0)
        shutil.rmtree(folder)


def test_a_closed_home_is_no_home(strangers_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In somebody else's home folder, as in containers, nothing is found, and a key in memory signs."""
    closed = strangers_folder / "closed"
    closed.mkdir(mode=0)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(closed))
    assert keys.find(None, chain_folder=None) is None
    with pytest.warns(CiuicWarning, match="kept in memory"):
        assert keys.load_or_create(None, chain_folder=None).path is None
    with pytest.raises(UsageError) as caught:
        keys.find(closed / "key", chain_folder=None)  # one that was named is not passed over
    assert caught.value.kind == "key_unreadable"
    closed.chmod(0o700)


def test_a_folder_that_cannot_be_listed_takes_a_key(strangers_folder: Path) -> None:
    """A folder that may be written but not opened cannot be synced; the key is made there all the same."""
    blind = strangers_folder / "blind"
    blind.mkdir(mode=0o300)
    key = keys.load_or_create(blind / "key", chain_folder=None)
    assert same(keys.find(blind / "key", chain_folder=None), key)
    blind.chmod(0o700)


@pytest.mark.parametrize(("number", "fails"), [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)])
def test_a_folder_that_cannot_be_synced(
    number: int, fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system that syncs no folders is no error; one whose disk fails is, for the key might not last."""
    sync = os.fsync

    def refuse(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    if fails:
        with pytest.raises(UsageError) as caught:
            keys.load_or_create(tmp_path / "key", chain_folder=None)
        assert caught.value.kind == "key_not_writable"
    else:
        made = keys.load_or_create(tmp_path / "key", chain_folder=None)
        assert same(keys.find(tmp_path / "key", chain_folder=None), made)
