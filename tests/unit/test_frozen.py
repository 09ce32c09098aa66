"""frozen=: copied and digested once, referred to ever after, and never wrong when something else goes wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from ciuic_async import Checkpointer, KeepLatest, SnapshotChain, StoreError
from ciuic_async.capture.state_tree import Captured
from ciuic_async.pipeline.persist import SaveRequest
from ciuic_async.retention.policy import Policy


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 300))
        self.head = nn.Linear(300, 10)
        self.trunk.requires_grad_(False)


def _train(model: _Model) -> None:
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.add_(1)


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes each staging copied."""
    sizes: list[int] = []
    real = Captured.without

    def without(self: Captured, regions: object) -> Captured:
        left = real(self, regions)  # type: ignore[arg-type]
        sizes.append(int(left.sources.sizes_bytes.sum()))
        return left

    monkeypatch.setattr(Captured, "without", without)
    return sizes


@pytest.mark.parametrize("windowed", [False, True])
def test_frozen_tensors_are_copied_once(tmp_path: Path, copied: list[int], windowed: bool) -> None:
    """From the second snapshot on only what is not frozen is copied and stored; every snapshot loads whole."""
    model = _Model()
    state = {"model": model, "big": torch.randn(3_000_000) if windowed else torch.zeros(1)}
    options = {"host_memory_bytes": 8 << 20} if windowed else {}
    trunk = {name: value.clone() for name, value in model.trunk.state_dict().items()}
    with Checkpointer(tmp_path / "chain", state, frozen=("model.trunk.*",), codec="raw", **options) as ckpt:  # type: ignore[arg-type]
        for number in range(4):
            _train(model)
            head = model.head.weight.detach().clone()
            snapshot = ckpt.save().wait_durable()
            loaded = snapshot.load()["model"]
            assert torch.equal(loaded["head.weight"], head)
            assert all(torch.equal(loaded[f"trunk.{name}"], value) for name, value in trunk.items())
            assert (number == 0) or snapshot.stored_bytes < 100_000
    trunk_bytes = sum(value.nbytes for value in trunk.values())
    assert len(copied) == 3
    others = sum(value.nbytes for value in model.head.state_dict().values()) + state["big"].nbytes  # type: ignore[union-attr]
    assert all(others <= size < others + trunk_bytes // 2 for size in copied)


def test_it_is_the_users_word(tmp_path: Path) -> None:
    """A frozen tensor that changes all the same is stored as it was: nobody looks again."""
    weights = torch.zeros(100_000)
    with Checkpointer(tmp_path / "chain", {"w": weights, "n": 1}, frozen=["w"]) as ckpt:
        ckpt.save().wait_durable()
        weights.add_(1)
        assert not ckpt.save().wait_durable().load()["w"].any()


def test_a_restore_forgets_what_was_frozen(tmp_path: Path) -> None:
    """After an older state was brought back its tensors are copied and digested anew."""
    weights = torch.zeros(100_000)
    state = {"w": weights}
    with Checkpointer(tmp_path / "chain", state, rng=False) as ckpt:
        first = ckpt.save().wait_durable()
    with Checkpointer(tmp_path / "chain", state, frozen=["w"], rng=False) as ckpt:
        weights.fill_(7)
        assert ckpt.save().wait_durable().load()["w"].eq(7).all()
        ckpt.restore(first.id)
        assert not weights.any()
        assert not ckpt.save().wait_durable().load()["w"].any()


def test_small_tensors_share_no_pack_with_others(tmp_path: Path) -> None:
    """A pack holds frozen tensors or others, so that a frozen bias needs no copy because of its neighbour."""
    state = {"m": {f"{kind}{number}": torch.zeros(100) for number in range(5) for kind in ("frozen", "live")}}
    with Checkpointer(tmp_path / "chain", state, frozen=["m.frozen*"], rng=False) as ckpt:
        ckpt.save().wait_durable()
        state["m"]["live0"].add_(1)
        snapshot = ckpt.save().wait_durable()
        assert len(snapshot.resolve().manifest.packs) == 2
        assert snapshot.load()["m"]["live0"].eq(1).all()
        assert ckpt.stats()[-1].deduplicated_bytes >= 5 * 400


def test_a_tensor_shared_with_one_that_is_not_frozen_is_not_frozen(tmp_path: Path) -> None:
    """Two names for one memory: it is frozen only if both are."""
    shared = torch.zeros(100_000)
    with Checkpointer(tmp_path / "chain", {"a": shared, "b": shared}, frozen=["a"], rng=False) as ckpt:
        ckpt.save().wait_durable()
        shared.add_(1)
        assert ckpt.save().wait_durable().load()["b"].eq(1).all()


@pytest.mark.damages
def test_when_the_parent_is_gone_the_next_snapshot_stores_it_again(tmp_path: Path) -> None:
    """What a frozen tensor refers to was deleted: that snapshot fails by name, the next one is whole."""
    weights = torch.randn(100_000)
    with Checkpointer(tmp_path / "chain", {"w": weights, "n": 1}, frozen=["w"], rng=False) as ckpt:
        ckpt.save().wait_durable()
        for segment in (tmp_path / "chain" / "segments").rglob("*.seg"):
            segment.unlink()
        failed = ckpt.save()
        with pytest.raises(Exception, match="w: frozen") as caught:
            failed.wait_durable()
        assert isinstance(caught.value.__cause__, StoreError)
        assert torch.equal(ckpt.save().wait_durable().load()["w"], weights)


@pytest.mark.parametrize("codec", ["auto", "smallest", "raw"])
def test_deltas_never_build_on_bytes_that_were_not_copied(tmp_path: Path, codec: str) -> None:
    """After it was forgotten a frozen tensor is stored from its own bytes, whatever an old slot still holds."""
    frozen, live = torch.randn(200_000), torch.randn(200_000)
    state = {"f": frozen, "l": live}
    with Checkpointer(tmp_path / "chain", state, frozen=["f"], rng=False, codec=codec) as ckpt:
        for number in range(6):
            live.mul_(1.0001)
            if number in (1, 3):  # the slot of the third snapshot holds what the tensor was in the first
                frozen.mul_(1.0001)
                ckpt._writer.frozen.forget()
            snapshot = ckpt.save().wait_durable()
            loaded = snapshot.load()
            assert torch.equal(loaded["f"], frozen)
            assert torch.equal(loaded["l"], live)


def test_retention_keeps_what_frozen_tensors_refer_to(tmp_path: Path) -> None:
    """With one snapshot kept, the first one's segment stays as long as frozen tensors lie in it."""
    keep: Policy = KeepLatest(1)
    weights = torch.randn(100_000)
    with Checkpointer(tmp_path / "chain", {"w": weights, "n": 0}, frozen=["w"], rng=False, keep=keep) as ckpt:
        for _ in range(5):
            ckpt.save().wait_durable()
    with SnapshotChain(tmp_path / "chain") as chain:
        assert torch.equal(chain.get("latest").load()["w"], weights)
        assert chain.verify().ok


def test_a_request_remembers_nothing_by_default() -> None:
    """Without frozen patterns every region is copied."""
    assert SaveRequest.__dataclass_fields__["remembered"].default_factory() == {}  # type: ignore[misc]


def test_the_same_values_in_another_layout_are_copied_again(tmp_path: Path) -> None:
    """Strides may change while values do not (channels_last): the bytes are others, and a restore gives the values."""
    model = nn.Module()
    model.trunk = nn.Conv2d(64, 64, 3)
    values = model.trunk.weight.detach().clone()
    with Checkpointer(tmp_path / "chain", {"model": model}, frozen=("model.trunk.*",), rng=False) as ckpt:
        ckpt.save().wait_durable()
        model.to(memory_format=torch.channels_last)
        second = ckpt.save().wait_durable()
        assert torch.equal(second.load()["model"]["trunk.weight"], values)


def test_another_small_tensor_in_the_same_place_is_copied(tmp_path: Path) -> None:
    """A pack is told by all its members, not by its first and its size."""
    state = {"m": {"a": torch.zeros(100), "old": torch.ones(100)}}
    with Checkpointer(tmp_path / "chain", state, frozen=("m.*",), rng=False) as ckpt:
        ckpt.save().wait_durable()
        del state["m"]["old"]
        state["m"]["new"] = torch.full((100,), 7.0)
        assert ckpt.save().wait_durable().load()["m"]["new"].eq(7).all()


def test_a_restore_that_fails_half_way_forgets_too(tmp_path: Path) -> None:
    """An object may refuse when others are restored already: what is live then is copied by the next snapshot."""

    class Refusing:
        def state_dict(self) -> dict[str, int]:
            return {"n": 1}

        def load_state_dict(self, state: object) -> None:
            raise ValueError("no")

    model = _Model()
    with Checkpointer(tmp_path / "chain", {"model": model, "r": Refusing()}, frozen=("model.trunk.*",)) as ckpt:
        first = ckpt.save().wait_durable()
        with torch.no_grad():
            model.trunk[0].weight.fill_(5)
        ckpt._writer.frozen.forget()
        ckpt.save().wait_durable()
        with pytest.raises(Exception, match="no"):
            ckpt.restore(first.id)
        live = model.trunk[0].weight.detach().clone()
        assert torch.equal(ckpt.save().wait_durable().load()["model"]["trunk.0.weight"], live)


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("codec", ["auto", "raw"])
def test_twenty_snapshots_of_a_fine_tuning_take_the_space_of_one(tmp_path: Path, told: bool, codec: str) -> None:
    """A trained head on a trunk that does not change: all files of 20 snapshots take at most a fifteenth of 20 copies.

    Whether the trunk is named ``frozen`` or found out by its digests.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 1024), nn.Linear(1024, 1024), nn.Linear(1024, 4))
    model[:3].requires_grad_(False)
    optimizer = torch.optim.AdamW(model[3].parameters())
    state = {"model": model, "optimizer": optimizer}
    chain = tmp_path / "chain"
    patterns = [f"model.{number}.*" for number in range(3)] if told else []
    with Checkpointer(chain, state, every_steps=1, codec=codec, rng=False, frozen=patterns) as ckpt:
        for _ in range(20):
            model(torch.randn(4, 1024)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            ckpt.step()
    full = sum(value.nbytes for value in model.state_dict().values())
    full += 2 * sum(parameter.nbytes for parameter in model[3].parameters())
    with SnapshotChain(chain, create=False) as history:
        assert len(history) == 20
        assert torch.equal(history.get("latest").load()["model"]["3.weight"], model[3].weight)
    assert sum(path.stat().st_size for path in chain.rglob("*") if path.is_file()) <= 20 * full / 15
