"""Policies: what is read is what was written, and everything that could mean two things is refused by line."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ciuic_async.errors import IntegrityError, UsageError
from ciuic_async.transparency.keys import SigningKey
from ciuic_async.transparency.note import parse_vkey
from ciuic_async.transparency.policy import Group, Policy, Witness

ORIGIN = "ciuic.dev/chain/" + "0" * 32
KEYS = [SigningKey.generate() for _ in range(7)]
LOG = KEYS[0].vkey(ORIGIN)
W = [KEYS[number].cosigner(f"w{number}.example") for number in range(7)]
HEAD = f"log {LOG}\n"
THREE = "".join(f"witness w{number} {W[number]}\n" for number in (1, 2, 3))


def parsed(text: str) -> Policy:
    return Policy.parse(text.encode(), "policy.txt")


def signed_by(*numbers: int) -> set[object]:
    return {parse_vkey(W[number]) for number in numbers}


def test_a_policy_with_everything() -> None:
    """Comments, tabs, empty lines, URLs, nested groups: each statement arrives, and format gives what parses alike."""
    text = (
        f"# writers\n\n  # indented\nlog {LOG} https://log.example/\n{THREE}"
        f"witness\ty {W[4]}   http://127.0.0.1:5000/w/\n"
        "group X 2 w1 w2 w3\ngroup all all X y\nquorum all\n"
    )
    policy = parsed(text)
    assert policy.logs == (parse_vkey(LOG),)
    assert policy.log_urls == ("https://log.example/",)
    assert policy.witnesses[3] == Witness("y", parse_vkey(W[4]), "http://127.0.0.1:5000/w/")
    assert policy.groups == (Group("X", 2, ("w1", "w2", "w3")), Group("all", 2, ("X", "y")))
    assert policy.quorum == "all"
    assert parsed(policy.format()) == policy
    assert policy.log_keys(ORIGIN) == policy.logs
    assert policy.log_keys("another") == ()


def test_a_quorum_is_counted_through_groups() -> None:
    """Two of three X and any y: exactly the sets that have both meet it; strangers count for nothing."""
    policy = parsed(f"{THREE}witness y {W[4]}\ngroup X 2 w1 w2 w3\ngroup Q all X y\nquorum Q\n")
    for count in range(5):
        for chosen in itertools.combinations((1, 2, 3, 4), count):
            found = policy.witnessed(signed_by(*chosen))  # type: ignore[arg-type]
            assert (found.have, found.count) == (count, 4)
            assert found.met == (4 in chosen and count >= 3)
    assert not policy.witnessed(signed_by(5, 6)).met  # type: ignore[arg-type]
    assert str(policy.witnessed(signed_by(1, 5))) == "1/4, quorum not met"  # type: ignore[arg-type]


def test_no_quorum_is_always_met() -> None:
    """``quorum none`` asks for nobody, and says how many signed all the same."""
    policy = parsed(f"{THREE}quorum none\n")
    assert policy.quorum is None
    assert str(policy.witnessed(set())) == "0/3"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", 0),
        (HEAD, 0),
        (f"{HEAD}quorum none", 0),
        (f"{HEAD}quorum none\nquorum none\n", 3),
        (f"{HEAD}quorum w1\n{THREE}", 2),
        (f"{THREE}group g 1 w1\ngroup h 1 w1\nquorum g\n", 5),
        (f"{THREE}group g 1 w1 w1\nquorum g\n", 4),
        (f"{THREE}group g 1 g\nquorum g\n", 4),
        (f"{THREE}group g 4 w1 w2 w3\nquorum g\n", 4),
        (f"{THREE}group g 0 w1\nquorum g\n", 4),
        (f"{THREE}group g 01 w1\nquorum g\n", 4),
        (f"{THREE}group g most w1\nquorum g\n", 4),
        (f"{THREE}group g any\nquorum g\n", 4),
        (f"{THREE}group w1 any w2\nquorum w1\n", 4),
        (f"{THREE}group none any w2\nquorum none\n", 4),
        (f"{THREE}group g any none\nquorum g\n", 4),
        (f"{THREE}witness w1 {W[5]}\nquorum none\n", 4),
        (f"{THREE}witness w9 {W[1]}\nquorum none\n", 4),
        (f"{THREE}witness w9 {KEYS[1].cosigner('other')}\nquorum none\n", 4),
        (f"{HEAD}witness w {W[0]}\nquorum none\n", 2),
        (f"{HEAD}{HEAD}quorum none\n", 2),
        (f"log {W[1]}\nquorum none\n", 1),
        (f"witness w {LOG}\nquorum none\n", 1),
        (f"log {LOG[:-2]}AA\nquorum none\n", 1),
        (f"log {LOG} ftp://x/\nquorum none\n", 1),
        (f"log {LOG} https://x:y/\nquorum none\n", 1),
        (f"log {LOG} https:///\nquorum none\n", 1),
        (f"log {LOG} https://x/ # trailing\nquorum none\n", 1),
        ("quorum none # trailing\n", 1),
        ("quorum\n", 1),
        ("Quorum none\n", 1),
        ("quorum none\r\n", 1),
        ("quorum none\x00\n", 1),
        (f"witness a+b {W[1]}\nquorum none\n", 1),
    ],
)
def test_what_could_mean_two_things_is_refused_by_line(text: str, line: int) -> None:
    """Each breach of the strict subset is ``policy_malformed``, and the message names file and line."""
    with pytest.raises(IntegrityError) as caught:
        parsed(text)
    assert caught.value.kind == "policy_malformed"
    assert str(caught.value).startswith(f"policy.txt, line {line}:" if line else "policy.txt:")


@pytest.mark.parametrize("data", [b"\xff\n", b"#" * (65 << 10), b"quorum none\n" + b"\n" * (64 << 10)])
def test_bytes_that_are_no_policy(data: bytes) -> None:
    """Not UTF-8, or more than a policy ever has: refused, unread beyond the limit."""
    with pytest.raises(IntegrityError) as caught:
        Policy.parse(data)
    assert caught.value.kind == "policy_malformed"


@given(st.binary(max_size=200) | st.text(max_size=100).map(lambda t: t.encode("utf-8", "replace")))
def test_any_bytes_parse_or_are_refused(data: bytes) -> None:
    """Whatever comes: a policy that formats to itself, or the typed error."""
    try:
        policy = Policy.parse(data)
    except IntegrityError as error:
        found = error.kind
    else:
        found = "policy_malformed" if Policy.parse(policy.format().encode()) == policy else "another"
    assert found == "policy_malformed"


def test_more_witnesses_than_a_note_has_room_for(tmp_path: Path) -> None:
    """The 65th witness is refused; 64 and a file are read."""
    lines = [f"witness n{n} {SigningKey.generate().cosigner(f'n{n}')}\n" for n in range(65)]
    path = tmp_path / "policy"
    path.write_text("".join(lines[:64]) + "quorum n0\n")
    assert len(Policy.load(path).witnesses) == 64
    with pytest.raises(IntegrityError, match="line 65"):
        parsed("".join(lines) + "quorum n0\n")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    """No file, a folder, a NUL in the name: a UsageError that names it."""
    for path in (tmp_path / "none", tmp_path, "a\0b"):
        with pytest.raises(UsageError) as caught:
            Policy.load(path)
        assert caught.value.kind == "policy_unreadable"
