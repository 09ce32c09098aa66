"""Configuration: which value wins, where it came from, and what is refused."""

from __future__ import annotations

import inspect
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ciuic_async
from ciuic_async import Checkpointer, CiuicWarning, KeepLatest, SnapshotChain, UsageError, parse_policy
from ciuic_async.config import settings, table
from ciuic_async.config.settings import Settings, load, missing, reading_files

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A working directory of its own, and no variable of ours."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for name in [name for name in os.environ if name.startswith("CIUIC_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(settings, "_told", set())
    yield
    Path(tmp_path, "work", "ciuic.json").unlink(missing_ok=True)  # no chain's, which would be verified


def _here(text: str, name: str = "ciuic.toml") -> Path:
    path = Path.cwd() / name
    path.write_text(text)
    return path


def _users(text: str) -> Path:
    path = Path(os.environ["XDG_CONFIG_HOME"], "ciuic", "ciuic.toml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def _load(**environment: str) -> Settings:
    return load(os.environ | environment, with_files=True)


def _value(name: str, **environment: str) -> object:
    loaded = _load(**environment)
    loaded.check()
    return loaded.by_name[name].value


def _problem(**environment: str) -> UsageError:
    with pytest.raises(UsageError) as caught:
        _load(**environment).check()
    return caught.value


# --- which one wins ---------------------------------------------------------------------------------------------------


def test_keyword_then_environment_then_folder_then_user_then_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each origin is passed over by the one before it, and every value says where it came from."""
    seen = []

    def look(given: Mapping[str, object]) -> object:
        with reading_files():
            return (dict(given) | {**missing("Checkpointer", given)}).get("every_steps")

    seen.append((look({}), _load().by_name["every_steps"].origin))
    users = _users("every_steps = 2")
    seen.append((look({}), _load().by_name["every_steps"].origin))
    _here("# mine\nevery_steps = 3")
    seen.append((look({}), _load().by_name["every_steps"].origin))
    monkeypatch.setenv("CIUIC_EVERY_STEPS", "4")
    seen.append((look({}), _load().by_name["every_steps"].origin))
    monkeypatch.setenv("CIUIC_EVERY_STEPS", "")
    assert look({"every_steps": 5}) == 5
    assert look({"every_steps": None}) is None
    assert seen == [
        (None, "default"),
        (2, f"file {users}:1"),
        (3, "file ciuic.toml:2"),
        (4, "environment CIUIC_EVERY_STEPS"),
    ]
    assert look({}) == 3


def test_options_come_one_by_one_from_wherever_they_stand() -> None:
    """A file that says nothing of an option leaves it to the next one."""
    _here('codec = "raw"')
    _users('codec = "smallest"\nwhen_busy = "skip"\n[trust]\npolicy = "p"\nmax_age = "1h"')
    loaded = _load(CIUIC_TRUST_MAX_AGE="2h")
    assert {name: loaded.by_name[name].value for name in ("codec", "when_busy", "trust.max_age")} == {
        "codec": "raw",
        "when_busy": "skip",
        "trust.max_age": 7200.0,
    }


def test_config_names_one_file_and_no_other_and_empty_means_none(tmp_path: Path) -> None:
    """``CIUIC_CONFIG`` stands for all files; JSON by its ending; empty switches files off."""
    _here("every_steps = 3")
    _users("every_epochs = 1")
    named = tmp_path / "other.json"
    named.write_text('{\n  "codec": "raw",\n  "trust": {\n    "policy": "a/p.txt"\n  }\n}')
    loaded = _load(CIUIC_CONFIG=str(named))
    loaded.check()
    assert [loaded.by_name[name].value for name in ("every_steps", "every_epochs", "codec")] == [None, None, "raw"]
    assert loaded.by_name["trust.policy"].value == str(tmp_path / "a/p.txt")
    assert loaded.by_name["trust.policy"].origin == f"file {named}:4"
    assert _load(CIUIC_CONFIG="").by_name["every_steps"].source == "default"
    assert _problem(CIUIC_CONFIG=str(tmp_path / "nothing")).kind == "config_not_found"


def test_json_is_found_where_there_is_no_toml() -> None:
    """``ciuic.json`` in the working directory is a configuration too, if it is no chain's."""
    _here('{"every_steps": 7, "frozen": ["a.*"], "keep": null}', "ciuic.json")
    assert _value("every_steps") == 7
    assert _value("frozen") == ("a.*",)
    assert _value("keep") is None
    _here("every_steps = 8")
    assert _value("every_steps") == 8


# --- what a value may be ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "text", "value"),
    [
        ("CIUIC_RNG", "No", False),
        ("CIUIC_RNG", "1", True),
        ("CIUIC_HOST_MEMORY_BYTES", "2GiB", 2 << 30),
        ("CIUIC_HOST_MEMORY_BYTES", "100000000", 100_000_000),
        ("CIUIC_EVERY_SECONDS", "10m", 600.0),
        ("CIUIC_EVERY_SECONDS", "1.5", 1.5),
        ("CIUIC_BUSY_TIMEOUT_S", "0", 0.0),
        ("CIUIC_MTBF_S", "none", None),
        ("CIUIC_OVERHEAD_BUDGET", "0.01", 0.01),
        ("CIUIC_PREEMPTION", "on", True),
        ("CIUIC_PREEMPTION", "0", False),
        ("CIUIC_PREEMPTION", "90s", 90.0),
        ("CIUIC_FROZEN", "model.trunk.*, model.head", ("model.trunk.*", "model.head")),
        ("CIUIC_KEEP", "latest=3", KeepLatest(3)),
        ("CIUIC_KEEP", "latest=3 | best=loss", parse_policy("latest=3 | best=loss")),
        ("CIUIC_ORDERING", "object-store", "object-store"),
    ],
)
def test_the_text_of_a_variable_means_what_the_keyword_takes(variable: str, text: str, value: object) -> None:
    """Booleans, numbers, sizes, durations, lists and rules are read from text."""
    name = next(option.name for option in table.OPTIONS if option.environment == variable)
    found = _value(name, **{variable: f" {text} "})
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("every_seconds = 60", 60.0),
        ('every_seconds = "1h"', 3600.0),
        ('host_memory_bytes = "8MiB"', 8 << 20),
        ("preemption = true", True),
        ("preemption = 1", 1.0),
        ('frozen = ["a", "b"]', ("a", "b")),
        ('keep = "daily=7"', parse_policy("daily=7")),
        ("rng = false", False),
    ],
)
def test_a_file_holds_typed_values(line: str, value: object) -> None:
    """TOML's own types, and texts with units."""
    _here(line)
    assert _value(line.partition(" ")[0]) == value


@pytest.mark.parametrize(
    ("variable", "text", "expected"),
    [
        ("CIUIC_EVERY_STEPS", "ten", "a whole number"),
        ("CIUIC_EVERY_STEPS", "0", "a whole number"),
        ("CIUIC_EVERY_STEPS", "1e3", "a whole number"),
        ("CIUIC_RNG", "maybe", "true or false"),
        ("CIUIC_OVERHEAD_BUDGET", "1", "a share between 0 and 1"),
        ("CIUIC_EVERY_SECONDS", "nan", "seconds above 0"),
        ("CIUIC_EVERY_SECONDS", "inf", "seconds above 0"),
        ("CIUIC_MTBF_S", "1e400", "seconds above 0"),
        ("CIUIC_STAGING", "fast", '"auto", "overlap", "blocking"'),
        ("CIUIC_HOST_MEMORY_BYTES", "1KiB", "at least 8 MiB"),
        ("CIUIC_KEEP", "lastest=3", "did you mean 'latest'"),
        ("CIUIC_ORDERING", "zookeeper://a", "etcd://"),
        ("CIUIC_TRUST_WITNESSES", "required", "without trust.policy"),
    ],
)
def test_a_wrong_variable_is_named_with_what_was_expected(variable: str, text: str, expected: str) -> None:
    """The message names the variable, the option, what was expected and what was found."""
    error = _problem(**{variable: text})
    assert error.kind == "config_value"
    assert variable in str(error)
    assert expected in str(error)


@pytest.mark.parametrize(
    ("text", "line", "kind", "says"),
    [
        ("\n\nevery_steps = true", 3, "config_value", "a whole number"),
        ('every_steps = "100"', 1, "config_value", "a whole number"),
        ("every_steps = 10000000000000000000000000000000000000000", 1, "config_value", "a whole number"),
        ("busy_timeout_s = 1" + "0" * 400, 1, "config_value", "seconds"),
        ('frozen = "model.*"', 1, "config_value", "a list"),
        ("keep = 3", 1, "config_value", "latest=3"),
        ("[trust]\nmax_age = 1" + "0" * 400 + '\npolicy = "p"', 2, "config_value", "seconds"),
        ("every_step = 1", 1, "config_unknown_key", "'every_steps'"),
        ('\n[trust]\npolicy = "p"\nwitness = "required"', 4, "config_unknown_key", "'trust.witnesses'"),
        ('trust = "policy.txt"', 1, "config_unknown_key", "a table"),
        ("[keep]\nlatest = 3", None, "config_value", "rules"),
        ("[training]\nlr = 1", None, "config_unknown_key", "no option"),
        ('\naws_secret_access_key = "CANARY"', 2, "secret_in_config", "environment"),
        ('[storage_options]\naccess_key_id = "CANARY"', None, "secret_in_config", "environment"),
        ('key = "ED25519-SECRET+CANARY"', 1, "secret_in_config", "path"),
        ('ordering = "etcd://user:CANARY@host:2379/a"', 1, "secret_in_config", "CIUIC_ETCD_PASSWORD"),
    ],
)
def test_a_wrong_file_is_named_with_its_line(text: str, line: int | None, kind: str, says: str) -> None:
    """The message names file and line, says what was expected, and never shows a secret."""
    _here(text)
    error = _problem()
    assert error.kind == kind
    assert says in str(error)
    assert str(error).startswith("ciuic.toml:" if line is None else f"ciuic.toml:{line}: ") or line is None
    assert "CANARY" not in str(error)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"every_steps = ", "config_malformed"),
        (b"every_steps = 1\nevery_steps = 2", "config_malformed"),
        (b"a = " + b"[" * 30_000, "config_malformed"),
        (b"a = \xff", "config_malformed"),
        (b"a = " + b"9" * 60_000, "config_malformed"),
        (b"#" * (64 << 10) + b"\n", "config_too_large"),
    ],
)
def test_what_is_no_configuration_is_refused_typed(content: bytes, kind: str) -> None:
    """Broken, nested without end, too large: an error that names the file, and how to do without it."""
    (Path.cwd() / "ciuic.toml").write_bytes(content)
    error = _problem()
    assert error.kind == kind
    assert "ciuic.toml" in str(error)
    assert "CIUIC_CONFIG=" in str(error)


@pytest.mark.parametrize("content", ["[1]", '{"a": 1, "a": 2}', '{"every_seconds": NaN}', "[" * 60_000])
def test_what_is_no_json_configuration_is_refused_typed(content: str) -> None:
    """The same for JSON: no table, a key twice, no number, nested without end."""
    _here(content, "ciuic.json")
    assert _problem().kind == "config_malformed"


def test_a_pipe_or_a_folder_of_that_name_is_not_waited_for() -> None:
    """What is no regular file is refused at once."""
    os.mkfifo("ciuic.toml")
    assert _problem().kind == "config_unreadable"
    os.unlink("ciuic.toml")
    os.mkdir("ciuic.toml")
    assert _problem().kind == "config_unreadable"


def test_a_file_that_anybody_may_write_is_not_found_but_may_be_named() -> None:
    """Somebody else's ``ciuic.toml`` in a shared folder chooses nothing here, unless it is named."""
    path = _here("every_steps = 3")
    path.chmod(0o666)
    assert _problem().kind == "config_not_yours"
    assert _value("every_steps", CIUIC_CONFIG=str(path)) == 3


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a link that is somebody else's")
def test_a_link_that_somebody_else_made_is_not_followed(tmp_path: Path) -> None:
    """It would choose which file of ours counts, and from where its paths are meant."""
    path = tmp_path / "mine.toml"
    path.write_text('key = "keys/mine.key"')
    link = Path.cwd() / "ciuic.toml"
    link.symlink_to(path)
    assert _value("key") == str(Path.cwd() / "keys" / "mine.key")
    os.lchown(link, 12345, 12345)
    assert _problem().kind == "config_not_yours"
    assert _value("key", CIUIC_CONFIG=str(path)) == str(tmp_path / "keys" / "mine.key")


@pytest.mark.parametrize(
    "text",
    ["every_steps = 0x" + "f" * 10_000, "every_steps." + "a." * 400 + "b = 1", "keep = " + "[" * 200 + "]" * 200],
    ids=["number", "tables", "lists"],
)
def test_a_value_that_cannot_be_shown_is_a_typed_problem(text: str) -> None:
    """Numbers too long to be written, and tables too deep, are wrong values like others."""
    _here(text)
    assert _problem().kind == "config_value"


def test_a_key_of_very_many_parts_takes_no_time() -> None:
    """A file of the largest size is an error at once, though the parser would take a minute."""
    _here("every_steps." + "a." * 32_000 + "b = 1")
    assert _problem().kind == "config_malformed"


@pytest.mark.parametrize(
    "value",
    ['"etcd//me:{}@host"', '"http://me:{}@host"', '{{url = "etcd://me:{}@host"}}', '["etcd://me:{}@host"]'],
)
def test_a_password_in_a_wrong_value_is_not_shown(value: str) -> None:
    """Whoever misspells a URL reads no password of it in the message, from a file or a variable."""
    secret = "canary-314159"
    _here("ordering = " + value.format(secret))
    assert secret not in str(_problem())
    assert secret not in str(_problem(CIUIC_ORDERING=value.format(secret).strip('"')))


def test_nothing_is_read_inside_a_chain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whose word counts never comes from the place that is checked; its ``ciuic.json`` is no configuration."""
    ciuic_async.save({"a": 1}, tmp_path / "chain")
    for folder in (tmp_path / "chain", tmp_path / "chain" / "segments"):
        monkeypatch.chdir(folder)
        assert _value("every_steps") is None
        planted = _here("every_steps = 3")
        caplog.clear()
        assert _value("every_steps") is None
        assert "is not read" in caplog.text
        planted.unlink()


def test_several_problems_are_counted() -> None:
    """The first is told, and how many more there are."""
    _here("every_step = 1\ncodecs = 2\nrng = 3")
    assert "and 2 more" in str(_problem())


# --- variables that are none ------------------------------------------------------------------------------------------


def test_a_misspelt_variable_is_told_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable near to an option's is a warning with that one's name; others may be anybody's."""
    monkeypatch.setenv("CIUIC_EVERY_STEP", "10")
    monkeypatch.setenv("CIUIC_SOMETHING_ELSE", "10")
    with pytest.warns(CiuicWarning, match="CIUIC_EVERY_STEP is no option.*CIUIC_EVERY_STEPS"):
        Checkpointer("chain", {"a": 1}).close()
    Checkpointer("chain", {"a": 1}).close()  # warnings are errors here: there is no second


def test_every_variable_that_the_package_names_is_in_the_table() -> None:
    """Whatever ``CIUIC_`` name stands in the sources is an option's, or one of the others."""
    known = {option.environment for option in table.OPTIONS} | set(table.OTHER_VARIABLES)
    named = set()
    for path in (ROOT / "ciuic_async").rglob("*.py"):
        named |= set(re.findall(r"CIUIC_[A-Z][A-Z_]*[A-Z]", path.read_text()))
    assert named <= known
    assert {"CIUIC_KEY", "CIUIC_ORDERING", "CIUIC_ASYNC_NATIVE", "CIUIC_ETCD_PASSWORD"} <= named


def test_the_tests_own_switches_are_near_to_no_option() -> None:
    """What the tests and the Makefile read gives no warning."""
    misspelt = ("test_config.py", "test_doctor.py")  # on purpose
    texts = [path.read_text() for path in (ROOT / "tests").rglob("*.py") if path.name not in misspelt]
    texts.append((ROOT / "Makefile").read_text())
    names = set(re.findall(r"CIUIC_[A-Z][A-Z_]*[A-Z]", " ".join(texts)))
    assert names
    assert load(dict.fromkeys(names, ""), with_files=False).strangers == ()


# --- who reads what ---------------------------------------------------------------------------------------------------


def test_training_goes_by_the_file_of_its_folder(caplog: pytest.LogCaptureFixture) -> None:
    """``Checkpointer`` reads ``ciuic.toml``, and says so in one line; arguments count for more."""
    path = _here('every_steps = 2\nkeep = "latest=1"\nordering = "object-store"\nkey = "keys/mine.key"')
    with caplog.at_level(logging.INFO, "ciuic_async"), Checkpointer("chain", {"a": torch.zeros(3)}) as ckpt:
        taken = [ckpt.step() is not None for _ in range(4)]
    assert taken == [False, True, False, True]
    assert len(ckpt.chain) == 1
    assert ckpt.chain.ordering == "object-store"
    assert Path("keys/mine.key").stat().st_mode & 0o777 == 0o600
    assert [record.getMessage() for record in caplog.records if "options from" in record.getMessage()] == [
        f"options from {path}: every_steps, keep, ordering, key"
    ]
    with Checkpointer("chain", {"a": torch.zeros(3)}, every_steps=None, keep=None) as ckpt:
        assert [ckpt.step() for _ in range(4)] == [None] * 4


def test_a_program_that_opens_a_chain_goes_by_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """``SnapshotChain`` and ``save`` read no file; variables count, and arguments more."""
    _here('ordering = "object-store"\ncodec = "nonsense"')
    with SnapshotChain("chain") as chain:
        assert chain.ordering == "local"
    monkeypatch.setenv("CIUIC_ORDERING", "object-store")
    with SnapshotChain("chain") as chain, SnapshotChain("chain", ordering="local") as other:
        assert (chain.ordering, other.ordering) == ("object-store", "local")
    monkeypatch.setenv("CIUIC_CODEC", "zip")
    with pytest.raises(UsageError, match="CIUIC_CODEC"):
        ciuic_async.save({"a": 1}, "chain")
    monkeypatch.setenv("CIUIC_EVERY_STEPS", "never")  # no option of a chain
    assert ciuic_async.save({"a": 1}, "chain", codec="raw").index == 1


def test_trust_from_the_environment_is_one_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Variables make up ``trust``; where the argument is given, none of them counts."""
    policy = tmp_path / "policy.txt"
    policy.write_text("quorum none\n")
    monkeypatch.setenv("CIUIC_TRUST_POLICY", str(policy))
    monkeypatch.setenv("CIUIC_TRUST_MAX_AGE", "1h")
    added = missing("SnapshotChain", {})
    assert added == {"trust": {"policy": str(policy), "max_age": 3600.0}}
    assert missing("SnapshotChain", {"trust": None}) == {}
    with SnapshotChain(tmp_path / "chain") as chain:
        assert chain.witness_status() == ()
    monkeypatch.setenv("CIUIC_TRUST_WITNESSES", "required")
    with pytest.raises(UsageError, match="no quorum"):
        SnapshotChain(tmp_path / "chain")


def test_the_key_in_the_environment_counts_for_more_than_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """``CIUIC_KEY`` wins over ``key`` of a file, and is never shown."""
    _here('key = "a.key"')
    monkeypatch.setenv("CIUIC_KEY", "b.key")
    with Checkpointer("chain", {"a": 1}) as ckpt:
        ckpt.save()
    assert Path("b.key").exists()
    assert not Path("a.key").exists()
    assert "b.key" not in json.dumps(_load().by_name["key"].written)


# --- the table, the signatures and the document -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reader", "call", "others"),
    [
        ("Checkpointer", Checkpointer.__init__, {"self", "chain", "state", "config", "listener", "key"}),
        (
            "SnapshotChain",
            SnapshotChain.__init__,
            {"self", "url", "create", "run", "trust", "previous", "mirror", "storage_options"},
        ),
        (
            "save",
            ciuic_async.save,
            {"state", "url", "tags", "metrics", "key", "step", "epoch", "batch", "config"},
        ),
    ],
)
def test_the_table_is_the_signatures(reader: str, call: object, others: set[str]) -> None:
    """Each argument that is an option is in the table with the default that help and IDEs show, and no other is."""
    parameters = inspect.signature(call).parameters  # type: ignore[arg-type]
    options = {o.name: o.default for o in table.OPTIONS if reader in o.readers and "." not in o.name}
    assert {name: p.default for name, p in parameters.items() if name not in others} == options


def test_the_document_has_the_table() -> None:
    """docs/configuration.md holds the tables as the code makes them."""
    assert table.markdown() in (ROOT / "docs" / "configuration.md").read_text()


# --- processes that are started from here -----------------------------------------------------------------------------


def test_processes_of_our_own_go_by_no_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the keeper and the demonstration get: no option and no file, but the key and everybody else's variables."""
    monkeypatch.setenv("CIUIC_ORDERING", "nonsense")
    monkeypatch.setenv("CIUIC_KEY", "a.key")
    monkeypatch.setenv("CIUIC_ETCD_PASSWORD", "p")
    _here("nonsense")
    environment = settings.bare_environment()
    assert "CIUIC_ORDERING" not in environment
    assert (environment["CIUIC_KEY"], environment["CIUIC_ETCD_PASSWORD"]) == ("a.key", "p")
    assert environment["PATH"] == os.environ["PATH"]
    load(environment, with_files=True).check()


def test_the_keeper_starts_whatever_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Options that training overrides by arguments cannot stop its keeper."""
    monkeypatch.setenv("CIUIC_ORDERING", "nonsense")
    monkeypatch.setenv("CIUIC_KEEPER", "true")
    with SnapshotChain("chain", ordering="local") as chain, Checkpointer(chain, {"a": torch.zeros(9)}) as ckpt:
        ckpt.save().wait_durable(60)
        assert ckpt.chain.verify().ok


def test_every_problem_has_a_kind_and_a_place() -> None:
    """Scripts tell problems apart by ``kind``, and find them by ``where``."""
    _here('every_step = 1\nrng = 3\ntoken = "x"')
    found = {(error.kind, error.where) for _, error in _load().problems}
    assert found == {
        ("config_unknown_key", "ciuic.toml:1"),
        ("config_value", "ciuic.toml:2"),
        ("secret_in_config", "ciuic.toml:3"),
    }


_LINE = st.sampled_from(
    ["[trust]", "[keep]", "every_steps = 1", "key = 'a'", "keep = '''", "'''", "x = [", "]", 'policy = "p"', "rng=true"]
)


@given(data=st.one_of(st.binary(max_size=200), st.lists(_LINE, max_size=8).map("\n".join).map(str.encode)))
def test_whatever_a_file_holds_is_settings_or_typed_problems(
    data: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """No bytes make loading raise anything; values that count have passed their checks."""
    for ending in ("toml", "json"):
        path = tmp_path_factory.mktemp("c") / f"own.{ending}"
        path.write_bytes(data)
        loaded = load({"CIUIC_CONFIG": str(path)}, with_files=True)
        assert set(loaded.by_name) == set(table.BY_NAME)
        assert all(isinstance(error, UsageError) and error.kind for _, error in loaded.problems)


@given(text=st.text(max_size=60), option=st.sampled_from(table.OPTIONS))
def test_whatever_a_variable_holds_is_a_value_or_a_typed_problem(text: str, option: table.Option) -> None:
    """No text makes an option raise anything else, or be taken without its check."""
    loaded = load({option.environment: text}, with_files=False)
    concerned = [error for own, error in loaded.problems if own is option]
    assert loaded.by_name[option.name].source == ("environment" if text.strip() else "default") or concerned
