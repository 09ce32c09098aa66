"""Training goes on bit for bit after a restore, whatever is trained with whatever.

Each test trains, takes a snapshot, trains on, goes back, and trains the same steps again: parameters, optimizer state,
random numbers and losses must be the same to the last bit, in the same objects and in new ones.
"""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from ciuic_async import Checkpointer, SnapshotChain
from tests.strategies import bits, fingerprint

STEPS_BEFORE, STEPS_AFTER = 3, 4


class Net(nn.Module):
    """Tied embeddings, running statistics and dropout."""

    def __init__(self, dtype: torch.dtype = torch.float32, sparse: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 16, sparse=sparse)
        self.body = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Dropout(0.3))
        self.head = nn.Linear(16, 32, bias=False)
        if not sparse:
            self.head.weight = self.embedding.weight
        self.to(dtype)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.body(self.embedding(tokens)))
        return result


class Fp32Moments(torch.optim.Optimizer):
    """Momentum in float32, in lists, for bfloat16 parameters: what ``Optimizer.load_state_dict`` casts away."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure()
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            if not state:
                state["moments"] = [torch.zeros_like(parameter, dtype=torch.float32) for _ in range(2)]
                state["mean"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["mean"].mul_(0.9).add_(parameter.grad.float())
            state["moments"][0].mul_(0.99).add_(state["mean"])
            parameter.sub_((0.01 * state["moments"][0]).to(parameter.dtype))
        return loss


class Loader:
    """A stateful loader: a shuffled order and a place in it."""

    def __init__(self) -> None:
        self.order = list(range(8))
        self.place = 0

    def next(self) -> int:
        if self.place % len(self.order) == 0:
            random.shuffle(self.order)
        self.place += 1
        return self.order[(self.place - 1) % len(self.order)]

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.order, "place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order, self.place = list(state["order"]), state["place"]


class Run:
    """A training run with everything in it."""

    def __init__(self, optimizer: Callable[[Any], Any], scheduler: Callable[[Any], Any], **options: Any) -> None:
        self.model = Net(**options)
        self.optimizer = optimizer(self.model.parameters())
        self.scheduler = scheduler(self.optimizer)
        self.average = torch.optim.swa_utils.AveragedModel(
            self.model,
            multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9),  # type: ignore[no-untyped-call]
        )
        self.loader = Loader()
        self.state: dict[str, Any] = {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "average": self.average,
            "loader": self.loader,
            "plain": {"best": float("inf"), "seen": [], "tensor": torch.zeros(3), "array": np.zeros(3)},
            "count": 0,
        }

    def train(self, steps: int) -> list[bytes]:
        """Losses, as bits."""
        losses = []
        for _ in range(steps):
            tokens = torch.randint(0, 32, (8,)) + 0 * self.loader.next()
            noise = np.random.random() + random.random()

            def closure(tokens: torch.Tensor = tokens, noise: float = noise) -> torch.Tensor:
                self.optimizer.zero_grad()
                loss = nn.functional.cross_entropy(self.model(tokens).float(), tokens) * (1 + 0.01 * noise)
                loss.backward()  # type: ignore[no-untyped-call]
                return loss

            loss = self.optimizer.step(closure).detach()
            if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                self.scheduler.step(float(loss))
            else:
                self.scheduler.step()
            self.average.update_parameters(self.model)
            plain = self.state["plain"]
            plain["best"] = min(plain["best"], float(loss))
            plain["seen"].append(float(loss))
            plain["tensor"] += loss
            plain["array"] += float(loss)
            self.state["count"] += 1
            losses.append(bits(loss))
        return losses

    def fingerprint(self) -> Any:
        values = {
            name: value.state_dict() if hasattr(value, "state_dict") else value for name, value in self.state.items()
        }
        return fingerprint([values, torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=False)])


def _seed(number: int) -> None:
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


def _constant(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.95**step)


def assert_goes_on_bit_for_bit(make: Callable[[], Run], chain: Path) -> None:
    _seed(1)
    run = make()
    with Checkpointer(chain, run.state) as ckpt:
        run.train(STEPS_BEFORE)
        at_snapshot = run.fingerprint()
        ckpt.save()
        losses = run.train(STEPS_AFTER)
        at_end = run.fingerprint()
        assert ckpt.restore() is not None
        assert run.fingerprint() == at_snapshot
        assert run.train(STEPS_AFTER) == losses
        assert run.fingerprint() == at_end

    _seed(2)
    fresh = make()
    fresh.train(1)
    with Checkpointer(chain, fresh.state) as ckpt:
        assert ckpt.restore() is not None
        assert fresh.fingerprint() == at_snapshot
        assert fresh.train(STEPS_AFTER) == losses
        assert fresh.fingerprint() == at_end


def _two_groups(parameters: list[Any]) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = [{"params": parameters[:1], "lr": 0.2}, {"params": parameters[1:]}]
    return torch.optim.SGD(groups, lr=0.1)


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adamw amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "adamw tensor lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01), foreach=False),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3, history_size=4),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "two groups": lambda p: _two_groups(list(p)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    """Moments, steps, histories and groups are restored exactly, in old and in new objects."""
    assert_goes_on_bit_for_bit(lambda: Run(OPTIMIZERS[name], _constant), tmp_path / "chain")


def test_float32_moments_of_bfloat16_parameters_stay_float32(tmp_path: Path) -> None:
    """``Optimizer.load_state_dict`` casts them, also inside lists; the restore undoes that."""
    assert_goes_on_bit_for_bit(lambda: Run(Fp32Moments, _constant, dtype=torch.bfloat16), tmp_path / "chain")
    assert_goes_on_bit_for_bit(
        lambda: Run(OPTIMIZERS["adamw foreach"], _constant, dtype=torch.bfloat16), tmp_path / "chain of adamw"
    )


def test_sparse_gradients_with_dense_state_go_on(tmp_path: Path) -> None:
    """SparseAdam's moments are dense tensors: they are state like any other."""
    model = nn.Embedding(16, 4, sparse=True)
    optimizer = torch.optim.SparseAdam(model.parameters())

    def train() -> None:
        optimizer.zero_grad()
        model(torch.randint(0, 16, (4,))).sum().backward()
        optimizer.step()  # type: ignore[no-untyped-call]

    state = {"model": model, "optimizer": optimizer}
    with Checkpointer(tmp_path / "chain", state) as ckpt, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of torch: sparse tensors are in beta
        train()
        ckpt.save()
        train()
        expected = fingerprint([model.state_dict(), optimizer.state_dict()])
        ckpt.restore()
        train()
        assert fingerprint([model.state_dict(), optimizer.state_dict()]) == expected


schedulers = torch.optim.lr_scheduler
SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "one cycle": lambda o: schedulers.OneCycleLR(o, max_lr=0.1, total_steps=20),
    "warm restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, T_0=2, T_mult=2),
    "plateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0, threshold=0.5),
    "sequential": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, total_iters=2), schedulers.CosineAnnealingLR(o, T_max=9)], milestones=[4]
    ),
    "lambda": _constant,
    "chained": lambda o: schedulers.ChainedScheduler([schedulers.StepLR(o, 2), schedulers.ExponentialLR(o, 0.9)]),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    """Learning rates follow the same course after a restore."""
    assert_goes_on_bit_for_bit(lambda: Run(OPTIMIZERS["sgd momentum"], SCHEDULERS[name]), tmp_path / "chain")


def test_a_gradient_scaler_goes_on(tmp_path: Path) -> None:
    """Scale and growth are restored exactly."""

    def make() -> dict[str, Any]:
        model = nn.Linear(4, 2)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
        return {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "scaler": scaler}

    def train(state: dict[str, Any], steps: int) -> Any:
        for _ in range(steps):
            state["optimizer"].zero_grad()
            state["scaler"].scale(state["model"](torch.randn(3, 4)).square().mean()).backward()
            state["scaler"].step(state["optimizer"])
            state["scaler"].update()
        return fingerprint([state["model"].state_dict(), state["scaler"].state_dict()])

    state = make()
    with Checkpointer(tmp_path / "chain", state) as ckpt:
        train(state, 3)
        ckpt.save()
        expected = train(state, 3)
        ckpt.restore()
        assert train(state, 3) == expected
    with Checkpointer(tmp_path / "chain", fresh := make()) as ckpt:
        ckpt.restore()
        assert train(fresh, 3) == expected


class Compiled(nn.Module):
    """Has the names of torch.compile's wrapper, without compiling."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self._orig_mod = inner


@pytest.mark.parametrize("saved_as", ["plain", "compiled", "parallel", "both"])
@pytest.mark.parametrize("loaded_as", ["plain", "compiled", "parallel", "both"])
def test_names_match_across_wrappers(saved_as: str, loaded_as: str, tmp_path: Path) -> None:
    """``_orig_mod.`` and ``module.`` in names make no difference, in either direction."""
    wrap: dict[str, Callable[[nn.Module], nn.Module]] = {
        "plain": lambda model: model,
        "compiled": Compiled,
        "parallel": lambda model: nn.ModuleDict({"module": model}),
        "both": lambda model: nn.ModuleDict({"module": Compiled(model)}),
    }
    saved, loaded = Net(), Net()
    with Checkpointer(tmp_path / "chain", {"model": wrap[saved_as](saved)}) as ckpt:
        ckpt.save()
    with Checkpointer(tmp_path / "chain", {"model": wrap[loaded_as](loaded)}) as ckpt:
        progress = ckpt.restore()
    assert progress is not None
    assert progress.mismatches == ()
    assert fingerprint(loaded.state_dict()) == fingerprint(saved.state_dict())


class Versioned(nn.Module):
    """Refuses a state_dict that does not tell its version."""

    _version = 3

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3))
        self.seen: Any = None

    def get_extra_state(self) -> Any:
        return {"note": "kept"}

    def set_extra_state(self, state: Any) -> None:
        self.extra = state

    def _load_from_state_dict(self, state_dict: Any, prefix: str, metadata: Any, *rest: Any) -> None:
        self.seen = metadata.get("version")
        super()._load_from_state_dict(state_dict, prefix, metadata, *rest)


@pytest.mark.parametrize("wrapped", [False, True])
def test_metadata_and_extra_state_survive(wrapped: bool, tmp_path: Path) -> None:
    """A module sees its own version and extra state again, also under a wrapper's names."""
    saved, loaded = Versioned(), Versioned()
    with Checkpointer(tmp_path / "chain", {"model": nn.Sequential(saved)}) as ckpt:
        ckpt.save()
    target = Compiled(nn.Sequential(loaded)) if wrapped else nn.Sequential(loaded)
    with Checkpointer(tmp_path / "chain", {"model": target}) as ckpt:
        ckpt.restore()
    assert loaded.seen == 3
    assert loaded.extra == {"note": "kept"}
    state = SnapshotChain(tmp_path / "chain").get("latest").load()["model"]
    assert state._metadata == nn.Sequential(saved).state_dict()._metadata  # type: ignore[attr-defined]


def test_a_frozen_trunk_is_stored_once(tmp_path: Path) -> None:
    """Ten snapshots of a model whose head is trained: big and small frozen tensors are written with the first only."""
    trunk = nn.Sequential(*[nn.Linear(256, 256) for _ in range(8)])
    head = nn.Linear(256, 2)
    for parameter in trunk.parameters():
        parameter.requires_grad_(False)
    model = nn.ModuleList([trunk, head])
    with Checkpointer(tmp_path / "chain", {"model": model}, rng=False, codec="raw") as ckpt:
        stored = []
        for _ in range(10):
            with torch.no_grad():
                for parameter in head.parameters():
                    parameter.add_(torch.randn_like(parameter))
            stored.append(ckpt.save().wait_durable(30).stored_bytes)
    trained_bytes = sum(parameter.numel() * 4 for parameter in head.parameters())
    assert stored[0] > 8 * 256 * 256 * 4
    assert max(stored[1:]) < trained_bytes + 8192, "a segment with the head, its frame and padding"


def test_a_frozen_bias_is_not_stored_with_a_trained_one(tmp_path: Path) -> None:
    """1000 small frozen tensors beside a small trained one cost nothing after the first snapshot."""
    model = nn.ParameterList([nn.Parameter(torch.randn(256), requires_grad=n == 500) for n in range(1001)])
    with Checkpointer(tmp_path / "chain", {"model": model}, rng=False, codec="raw") as ckpt:
        first = ckpt.save().wait_durable(30)
        with torch.no_grad():
            model[500].add_(1)
        second = ckpt.save().wait_durable(30)
    assert first.stored_bytes > 1000 * 1024
    assert second.stored_bytes < 16_384


def test_restoring_fills_parameters_in_place(tmp_path: Path) -> None:
    """Parameters and buffers keep identity and memory: views and optimizers that hold them see the restored values."""
    model = Net()
    kept = {name: (tensor, tensor.data_ptr()) for name, tensor in model.state_dict(keep_vars=True).items()}
    with Checkpointer(tmp_path / "chain", {"model": model}) as ckpt:
        ckpt.save()
        expected = fingerprint(model.state_dict())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        ckpt.restore()
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert tensor is kept[name][0]
        assert tensor.data_ptr() == kept[name][1]
    assert fingerprint(model.state_dict()) == expected
    assert model.head.weight is model.embedding.weight


def test_layouts_of_live_parameters_may_differ(tmp_path: Path) -> None:
    """channels_last saved, contiguous live, and the other way: values are the same, live strides stay."""

    def convolution(layout: torch.memory_format) -> Any:
        model: Any = nn.Conv2d(3, 4, 3)
        return model.to(memory_format=layout)

    saved = convolution(torch.channels_last)
    for live in (convolution(torch.contiguous_format), convolution(torch.channels_last)):
        chain = tmp_path / f"chain{live.weight.stride()}"
        with Checkpointer(chain, {"model": saved}) as ckpt:
            ckpt.save()
        strides = live.weight.stride()
        with Checkpointer(chain, {"model": live}) as ckpt:
            ckpt.restore()
        assert bits(live.weight) == bits(saved.weight)
        assert live.weight.stride() == strides


def test_plain_trees_are_restored_where_they_are(tmp_path: Path) -> None:
    """Tensors, arrays, dicts and lists are filled in place; what cannot change is replaced in the state mapping."""
    tensor, array, inner, items = torch.zeros(3), np.zeros(3), {"a": 1}, [1, 2]
    state: dict[str, Any] = {
        "t": tensor,
        "a": array,
        "d": {"inner": inner, "l": items},
        "n": 5,
        "x": torch.ones(1).expand(3),
    }
    with Checkpointer(tmp_path / "chain", state) as ckpt:
        ckpt.save()
        tensor += 1
        array += 1
        inner["a"], inner["b"] = 2, 3
        items.append(9)
        state["n"] = 6
        ckpt.restore()
    assert state["t"] is tensor
    assert state["a"] is array
    assert (tensor.sum(), array.sum(), inner, items, state["n"]) == (0, 0, {"a": 1}, [1, 2], 5)
    assert torch.equal(state["x"], torch.ones(3))


def _one_tensor() -> dict[str, Any]:
    weights = torch.zeros(2)
    return {"weights": weights, "best": weights}


def _one_tensor_in_views() -> dict[str, Any]:
    weights = torch.zeros(4)
    return {"all": {"weights": weights, "best": weights[1:3]}}


def _the_model_itself() -> dict[str, Any]:
    model = nn.Linear(2, 2)
    return {"model": model, "extra": {"best": model.state_dict(), "parameter": model.bias}}


def _one_dict() -> dict[str, Any]:
    metrics = {"loss": [0]}
    return {"metrics": metrics, "best": metrics}


def _one_array() -> dict[str, Any]:
    array = np.zeros(2)
    return {"x": (array, [array])}


def _the_optimizers_state() -> dict[str, Any]:
    parameter = nn.Parameter(torch.zeros(200, 200))
    optimizer = torch.optim.Adam([parameter])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return {"extra": {"m": optimizer.state[parameter]["exp_avg"]}, "optimizer": optimizer}


def _parted(value: Any) -> Any:
    """Copies, all with another content, of a plain tree that shared."""
    if isinstance(value, torch.Tensor):
        return torch.rand(value.shape)
    if isinstance(value, np.ndarray):
        return np.random.default_rng(int(torch.randint(1 << 30, ()))).random(value.shape)
    if isinstance(value, dict):
        return type(value)((key, _parted(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return type(value)(map(_parted, value))
    return int(torch.randint(1 << 30, ())) if isinstance(value, int) else value


@pytest.mark.parametrize(
    "make",
    [_one_tensor, _one_tensor_in_views, _the_model_itself, _one_dict, _one_array, _the_optimizers_state],
    ids=lambda make: make.__name__.removeprefix("_"),
)
@pytest.mark.parametrize("turned", [False, True])
def test_what_is_shared_now_and_was_not_when_saved_is_parted(
    make: Callable[[], dict[str, Any]], turned: bool, tmp_path: Path
) -> None:
    """A ``best`` begins as the current state itself, and is a copy by the time of the snapshot: restored into objects
    that share again, each has what it had."""

    def state() -> dict[str, Any]:
        made = make()
        return dict(reversed(made.items())) if turned else made

    def values(value: Any) -> Any:
        value = value.state_dict() if hasattr(value, "state_dict") else value
        if isinstance(value, dict):
            return {key: values(item) for key, item in value.items()}
        return fingerprint(value)

    saved = state()
    for name, value in saved.items():
        if not hasattr(value, "state_dict"):
            saved[name] = _parted(value)
    with Checkpointer(tmp_path / "chain", saved, rng=False) as ckpt:
        ckpt.save()
    live = state()
    with Checkpointer(tmp_path / "chain", live, rng=False) as ckpt:
        ckpt.restore()
        assert values(live) == values(saved)


def test_what_is_shared_now_and_was_when_saved_stays_shared(tmp_path: Path) -> None:
    """Tensors, views, arrays and dicts that are at two places are filled where they are, at both."""
    model, weights, array = nn.Linear(2, 2), torch.zeros(4), np.zeros(2)
    metrics: dict[str, Any] = {"loss": 0}
    state: dict[str, Any] = {
        "model": model,
        "best": model.state_dict(),
        "w": [weights, weights, weights[1:3]],
        "a": [array, array],
        "d": [metrics, metrics],
    }
    metrics["inner"] = [array, weights]
    before = [state["best"]["weight"], *state["w"], *state["a"], *state["d"]]
    with Checkpointer(tmp_path / "chain", state, rng=False) as ckpt:
        ckpt.save()
        with torch.no_grad():
            model.weight.fill_(7)
        weights += 1
        array += 1
        metrics["loss"] = 1
        ckpt.restore()
    after = [state["best"]["weight"], *state["w"], *state["a"], *state["d"]]
    assert all(one is other for one, other in zip(before, after, strict=True))
    assert (float(weights.sum()), float(array.sum()), metrics["loss"]) == (0.0, 0.0, 0)
    assert torch.equal(state["best"]["weight"], model.weight)
    assert not bool((model.weight == 7).any())


class Pair(NamedTuple):
    """A named tuple of this module."""

    tensor: torch.Tensor
    number: int


def test_tensors_inside_tuples_are_filled_in_place(tmp_path: Path) -> None:
    """A tuple whose items stay the same objects stays itself; else a new one holds the live tensors."""

    class Local(NamedTuple):  # a class that cannot be found by name comes back as a new type
        array: np.ndarray[Any, Any]

    same = (torch.zeros(3), [torch.zeros(2)], None)
    other = Pair(torch.zeros(4), 1)
    local = Local(np.zeros(2))
    state: dict[str, Any] = {"same": same, "other": other, "local": local, "inner": {"deep": [(torch.zeros(1),)]}}
    deep = state["inner"]["deep"][0]
    live = [same[0], same[1][0], other.tensor, deep[0]]
    with Checkpointer(tmp_path / "chain", state) as ckpt:
        ckpt.save()
        for tensor in live:
            tensor += 1
        local.array[...] = 1
        state["other"] = Pair(other.tensor, 7)
        ckpt.restore()
    assert [float(tensor.sum()) for tensor in live] == [0, 0, 0, 0]
    assert local.array.sum() == 0
    assert state["same"] is same
    assert state["local"] is local
    assert state["inner"]["deep"][0] is deep
    assert type(state["other"]) is Pair
    assert state["other"].tensor is other.tensor
    assert state["other"].number == 1


def test_the_seeds_of_a_run_are_part_of_it(tmp_path: Path) -> None:
    """rng=True brings back python's, numpy's and torch's generators; rng=False leaves them alone."""

    def draw() -> list[float]:
        return [random.random(), float(np.random.random()), float(torch.rand(()))]

    for rng in (True, False):
        with Checkpointer(tmp_path / f"chain {rng}", {"n": 1}, rng=rng) as ckpt:
            ckpt.save()
            first = draw()
            ckpt.restore()
            assert (draw() == first) is rng


def _batches() -> Iterator[torch.Tensor]:
    while True:
        yield torch.randn(4, 4)


def test_capturing_does_not_disturb_training(tmp_path: Path) -> None:
    """A run with a snapshot at every step has the same losses as one without any."""

    def losses(every: int | None) -> list[bytes]:
        _seed(3)
        model = nn.Linear(4, 4)
        optimizer = torch.optim.Adam(model.parameters())
        result = []
        with Checkpointer(tmp_path / f"{every}", {"model": model, "optimizer": optimizer}, every_steps=every) as ckpt:
            for _, batch in zip(range(6), _batches(), strict=False):
                optimizer.zero_grad()
                loss = model(batch).square().mean()
                loss.backward()
                optimizer.step()
                result.append(bits(loss))
                ckpt.step()
        return result

    assert losses(1) == losses(None)


def test_what_was_captured_does_not_follow_training(tmp_path: Path) -> None:
    """The stored state is that of the call, though training changes everything right behind it."""
    model = nn.Linear(64, 64)
    with Checkpointer(tmp_path / "chain", {"model": model, "log": [1]}, rng=False) as ckpt:
        expected = copy.deepcopy(model.state_dict())
        pending = ckpt.save()
        with torch.no_grad():
            model.weight.fill_(7)
        loaded = pending.wait_durable(30).load()
    assert fingerprint(loaded["model"]) == fingerprint(expected)
