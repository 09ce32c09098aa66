"""Retention rules: what each keeps of a list of snapshots, and that their text says the same as they do."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ciuic_async import (
    KeepAny,
    KeepBest,
    KeepBytes,
    KeepDaily,
    KeepEvery,
    KeepHourly,
    KeepLatest,
    KeepTagged,
    KeepWeekly,
    KeepWithin,
    UsageError,
    parse_policy,
)
from ciuic_async.arguments import check_policy
from ciuic_async.format.entry import ChunkTree, Common, FileReference, SnapshotEntry, timestamp
from ciuic_async.retention import words
from ciuic_async.retention.policy import Policy, Rule, choose

START = datetime(2026, 11, 22, 6, 31, tzinfo=UTC)


def snapshot(
    number: int,
    step: int | None = None,
    *,
    after: timedelta = timedelta(0),
    tags: tuple[str, ...] = (),
    stored_bytes: int = 100,
    **metrics: float,
) -> SnapshotEntry:
    created = timestamp((START + after).timestamp())
    return SnapshotEntry(
        Common("fedcba9876543210fedc", created, "node-3", "ciuic_async/1.0.0"),
        f"{number:020x}",
        None,
        step,
        None,
        None,
        tags,
        tuple(sorted((name, repr(value)) for name, value in metrics.items())),
        FileReference(f"manifests/{number:020x}/root.json", bytes(32), 1),
        ChunkTree(bytes(32), 0),
        0,
        stored_bytes,
    )


def steps_kept(policy: Policy, snapshots: Sequence[SnapshotEntry]) -> list[int | None]:
    kept = policy.keep(snapshots)
    return [entry.step for entry in snapshots if entry.snapshot in kept]


def numbers_kept(policy: Policy, snapshots: Sequence[SnapshotEntry]) -> list[int]:
    return sorted(int(one, 16) for one in policy.keep(snapshots))


names = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S", "Zs"]), min_size=1, max_size=12).filter(
    str.isprintable
)
counts = st.integers(1, 10**9)
rules: st.SearchStrategy[Policy] = st.one_of(
    counts.map(KeepLatest),
    counts.map(KeepEvery),
    st.builds(KeepBest, names, counts, st.booleans()),
    st.lists(names, max_size=3).map(lambda patterns: KeepTagged(*patterns)),
    counts.map(KeepHourly),
    counts.map(KeepDaily),
    counts.map(KeepWeekly),
    st.one_of(counts, st.floats(1e-9, 1e14)).map(KeepWithin),
    st.integers(1, 10**15).map(KeepBytes),
)
small_rules: st.SearchStrategy[Policy] = st.one_of(
    st.integers(1, 5).map(KeepLatest),
    st.integers(1, 9).map(KeepEvery),
    st.builds(KeepBest, st.sampled_from(["loss", "acc"]), st.integers(1, 3), st.booleans()),
    st.sampled_from([KeepTagged(), KeepTagged("a"), KeepTagged("b*", "c")]),
    st.integers(1, 4).map(KeepHourly),
    st.integers(1, 4).map(KeepDaily),
    st.integers(1, 4).map(KeepWeekly),
    st.integers(1, 10**6).map(KeepWithin),
    st.integers(1, 1000).map(KeepBytes),
)


@st.composite
def histories(draw: st.DrawFn) -> list[SnapshotEntry]:
    """Any snapshots, in any order of steps and times."""
    values = st.sampled_from([0.5, 1.0, -2.0, float("nan"), float("inf")])
    return [
        snapshot(
            number,
            draw(st.none() | st.integers(0, 30)),
            after=timedelta(minutes=draw(st.integers(0, 50_000))),
            tags=tuple(draw(st.sets(st.sampled_from(["a", "bb", "c"]), max_size=2))),
            stored_bytes=draw(st.integers(0, 400)),
            **draw(st.dictionaries(st.sampled_from(["loss", "acc"]), values)),
        )
        for number in range(draw(st.integers(0, 12)))
    ]


# --- every rule -------------------------------------------------------------------------------------------------------


@given(rule=small_rules, snapshots=histories())
def test_a_rule_keeps_some_of_what_there_is(rule: Policy, snapshots: list[SnapshotEntry]) -> None:
    """Nothing is kept that is not there, the list is left alone, and asking again gives the same."""
    before = list(snapshots)
    kept = rule.keep(snapshots)
    assert kept <= {entry.snapshot for entry in snapshots}
    assert snapshots == before
    assert rule.keep(snapshots) == kept


@given(rule=small_rules, snapshots=histories())
def test_pruning_again_drops_nothing_more(rule: Policy, snapshots: list[SnapshotEntry]) -> None:
    """What a rule kept of all, with the latest, it keeps of what is left."""
    kept = rule.keep(snapshots) | {entry.snapshot for entry in snapshots[-1:]}
    left = [entry for entry in snapshots if entry.snapshot in kept]
    assert rule.keep(left) >= kept - {entry.snapshot for entry in snapshots[-1:]}


@given(parts=st.lists(small_rules, min_size=2, max_size=4), snapshots=histories())
def test_a_union_keeps_what_its_parts_keep(parts: list[Any], snapshots: list[SnapshotEntry]) -> None:
    """``a | b | c`` in any grouping, with and without sizes at hand."""
    union = parts[0]
    for part in parts[1:]:
        union = union | part
    expected = set().union(*(part.keep(snapshots) for part in parts))
    assert union.keep(snapshots) == expected
    assert union == KeepAny(tuple(parts))
    assert (parts[0] | KeepAny(tuple(parts[1:]))) == union
    sizes = {entry.snapshot: {entry.snapshot: entry.stored_bytes} for entry in snapshots}
    assert choose(union, snapshots, sizes.__getitem__) == expected


@given(policy=st.one_of(rules, st.lists(rules, min_size=2, max_size=4).map(lambda parts: KeepAny(tuple(parts)))))
def test_what_is_described_is_read_back(policy: Policy) -> None:
    """The text in a prune entry means the same policy."""
    assert parse_policy(policy.describe()) == policy
    check_policy(policy)


# --- each rule --------------------------------------------------------------------------------------------------------


def test_every_keeps_the_first_of_each_range_of_steps() -> None:
    """Multiples where there are any, else the next step after one; without a step nothing."""
    line = [snapshot(n, step) for n, step in enumerate([0, 400, 1000, 1300, 2050, 2100, 4000])]
    assert steps_kept(KeepEvery(1000), line) == [0, 1000, 2050, 4000]
    assert steps_kept(KeepEvery(1000), [snapshot(1), snapshot(2)]) == []


def test_every_prefers_the_line_to_what_was_abandoned() -> None:
    """After a rollback the steps that were done again count, not those that were given up."""
    abandoned = [snapshot(n, step) for n, step in enumerate([1100, 1200, 2000, 3000])]
    line = [snapshot(10 + n, step) for n, step in enumerate([500, 1050, 1150, 2050])]
    assert numbers_kept(KeepEvery(1000), [*abandoned, *line]) == [3, 10, 11, 13]
    tied = [snapshot(0, 1000), snapshot(1, 1000)]
    assert numbers_kept(KeepEvery(1000), tied) == [1]


def test_best_is_the_smallest_unless_told_otherwise() -> None:
    """NaN and snapshots without the metric never win; of equals the newest stays."""
    line = [
        snapshot(0, loss=2.0),
        snapshot(1, loss=1.0),
        snapshot(2, loss=float("nan")),
        snapshot(3, loss=1.0),
        snapshot(4, acc=0.5),
        snapshot(5, loss=3.0),
    ]
    assert numbers_kept(KeepBest("loss"), line) == [3]
    assert numbers_kept(KeepBest("loss", 3), line) == [0, 1, 3]
    assert numbers_kept(KeepBest("loss", largest=True), line) == [5]
    assert numbers_kept(KeepBest("f1"), line) == []


def test_tagged_keeps_by_name_or_pattern() -> None:
    """Without a name any tag will do."""
    line = [snapshot(0, tags=("v1",)), snapshot(1), snapshot(2, tags=("x", "best")), snapshot(3, tags=("V1",))]
    assert numbers_kept(KeepTagged(), line) == [0, 2, 3]
    assert numbers_kept(KeepTagged("v*"), line) == [0]
    assert numbers_kept(KeepTagged("best", "V?"), line) == [2, 3]


def test_periods_keep_the_newest_of_each() -> None:
    """Hours, days and ISO weeks of UTC that have a snapshot; empty ones do not count."""
    hours = [0, 0.2, 0.4, 1, 5, 26, 26.1, 24 * 9]
    line = [snapshot(n, after=timedelta(hours=at)) for n, at in enumerate(hours)]  # a Sunday, 6:31
    assert numbers_kept(KeepHourly(3), line) == [4, 6, 7]
    assert numbers_kept(KeepHourly(99), line) == [2, 3, 4, 6, 7]
    assert numbers_kept(KeepDaily(2), line) == [6, 7]
    assert numbers_kept(KeepDaily(9), line) == [4, 6, 7]
    assert numbers_kept(KeepWeekly(9), line) == [4, 6, 7]
    assert numbers_kept(KeepWeekly(1), line) == [7]


def test_periods_prefer_the_line_to_what_was_abandoned() -> None:
    """An abandoned snapshot of the same hour goes although it may be newer."""
    abandoned, line = snapshot(0, after=timedelta(minutes=20)), snapshot(1, after=timedelta(minutes=10))
    assert numbers_kept(KeepHourly(5), [abandoned, line]) == [1]


def test_within_counts_back_from_the_latest() -> None:
    """A training that stood still for a year loses nothing by it."""
    line = [snapshot(n, after=timedelta(hours=at)) for n, at in enumerate([0, 10, 23, 24])]
    assert numbers_kept(KeepWithin(3600), line) == [2, 3]
    assert numbers_kept(KeepWithin(24 * 3600), line) == [0, 1, 2, 3]
    assert numbers_kept(KeepWithin(1), []) == []


def test_bytes_counts_what_is_shared_once() -> None:
    """The newest ones that fit together; the first that does not fit ends it, abandoned ones come last."""
    line = [snapshot(n) for n in range(4)]
    files = {
        line[3].snapshot: {"a": 100, "b": 10},
        line[2].snapshot: {"a": 100, "c": 10},
        line[1].snapshot: {"d": 500},
        line[0].snapshot: {"a": 100},
    }
    assert choose(KeepBytes(120), line, files.__getitem__) == {line[2].snapshot, line[3].snapshot}
    assert choose(KeepBytes(119), line, files.__getitem__) == {line[3].snapshot}
    assert choose(KeepBytes(1000), line, files.__getitem__) == set(files)
    assert choose(KeepBytes(1), line, files.__getitem__) == set()
    assert numbers_kept(KeepBytes(250), line) == [2, 3]


class Mine:
    """A policy of a user's own, which knows nothing of ours."""

    def keep(self, snapshots: Sequence[SnapshotEntry]) -> set[str]:
        return {entry.snapshot for entry in snapshots if entry.step == 7}

    def describe(self) -> str:
        return "lucky"


def test_users_policies_take_part_in_unions() -> None:
    """On either side of |; what is no policy is refused there and then."""
    line = [snapshot(n, n) for n in range(10)]
    for union in (KeepLatest(1) | Mine(), Mine() | KeepLatest(1)):
        assert steps_kept(union, line) == [7, 9]
        assert "lucky" in union.describe()
    with pytest.raises(UsageError, match="no policy"):
        KeepLatest(1) | 3  # type: ignore[operator]


# --- texts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("latest=3", KeepLatest(3)),
        ("every=1000", KeepEvery(1000)),
        ("best=loss", KeepBest("loss")),
        ("best=accuracy:largest", KeepBest("accuracy", largest=True)),
        ("best=loss:3:smallest", KeepBest("loss", 3)),
        ("best=val%3Aloss", KeepBest("val:loss")),
        ("tagged", KeepTagged()),
        ("tagged=v*,final", KeepTagged("v*", "final")),
        ("tagged=100%", KeepTagged("100%")),
        ("hourly=24", KeepHourly(24)),
        ("daily=7", KeepDaily(7)),
        ("weekly=4", KeepWeekly(4)),
        ("within=2d", KeepWithin(2 * 86400)),
        ("within=90", KeepWithin(90)),
        ("within=1.5h", KeepWithin(5400)),
        ("bytes=100GB", KeepBytes(100 * 10**9)),
        ("bytes=1tib", KeepBytes(2**40)),
        (" latest=3|tagged | daily = 7 ", KeepLatest(3) | KeepTagged() | KeepDaily(7)),
    ],
)
def test_texts_mean_policies(text: str, policy: Policy) -> None:
    """What the command line takes."""
    assert parse_policy(text) == policy


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lattest=3", "did you mean 'latest'"),
        ("dayly=3", "did you mean 'daily'"),
        ("x", "rules are latest, every"),
        ("", "rules are"),
        ("latest=3 |", "rules are"),
        ("latest", "expected a value, e.g. latest=3"),
        ("latest=", "expected a value"),
        ("tagged=", "expected a value"),
        ("latest=three", "whole number"),
        ("latest=0", "at least 1"),
        ("every=-5", "whole number"),
        ("best=loss:most", "whole number"),
        ("within=2 fortnights", "30m, 24h"),
        ("within=0", "above 0"),
        ("within=..e5s", "no number"),
        ("bytes=lots", "100GB"),
        ("bytes=0.1B", "at least 1"),
        ("latest=" + "9" * 40, "whole number"),
        ("x" * 20_000, "20000 characters"),
    ],
)
def test_wrong_texts_are_refused_with_the_right_one(text: str, said: str) -> None:
    """A UsageError that names what is wrong and what would be right."""
    with pytest.raises(UsageError) as caught:
        parse_policy(text)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "make",
    [
        lambda: KeepEvery(0),
        lambda: KeepEvery(1.5),  # type: ignore[arg-type]
        lambda: KeepBest(""),
        lambda: KeepBest("loss", 0),
        lambda: KeepTagged("a\n"),
        lambda: KeepHourly(True),
        lambda: KeepDaily("7"),  # type: ignore[arg-type]
        lambda: KeepWithin(0),
        lambda: KeepWithin(float("nan")),
        lambda: KeepWithin(float("inf")),
        lambda: KeepBytes(-1),
    ],
)
def test_rules_refuse_what_means_nothing(make: Any) -> None:
    """Numbers below one, wrong types, texts that do not print."""
    with pytest.raises(UsageError, match=r"Keep\w+"):
        make()


@given(st.integers(1, 10**15))
def test_sizes_and_durations_are_read_back(value: int) -> None:
    """The largest unit that divides a number loses nothing."""
    assert words.read_size(words.size(value), "x") == value
    assert words.read_duration(words.duration(value), "x") == value


@given(names)
def test_quoted_names_are_read_back(name: str) -> None:
    """Nothing in a name means anything else."""
    quoted = words.quote(name)
    assert words.unquote(quoted) == name
    assert not set("|,:= ") & set(quoted)


def test_policies_are_values() -> None:
    """They compare by what they keep, cannot be changed, and have a repr that makes them again."""
    assert repr(KeepDaily(3)) == "KeepDaily(count=3)"
    assert KeepDaily(3) != KeepHourly(3)
    assert len({KeepTagged("a"), KeepTagged("a"), KeepTagged()}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        KeepLatest(3).count = 4  # type: ignore[misc]
    assert isinstance(KeepLatest(1) | KeepLatest(2), Rule)
