"""The training program of ``ciuic demo``: a small GPT learns the texts that come with every Python.

It is meant to be read: ``train`` below is all there is to using the engine. Whatever moment the process is killed at,
starting it again with the same arguments goes on from the newest durable snapshot, and ends with the same bits as a run
that was never interrupted.

Run as a program it reports one line at a time on standard output, so that a parent can follow it and kill it:

    started 15          training begins after step 15 (0: from scratch)
    step 16 3.0718      this step's update is done; its loss
    snapshot 20         the state of step 20 is captured, its bytes are being written behind training
    durable 20          that snapshot is on stable storage
    done {...}          digests of the final state, and figures, as JSON
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import pydoc_data.topics
import random
import statistics
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - PyTorch's own convention

from ciuic_async import Checkpointer

VOCABULARY = 256  # bytes: no tokenizer needed
TEXT_SIZE_BYTES = 2 << 20
THREADS = 1  # the same in every run: another number of threads sums in another order
SEED = 20_251_122

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Size:
    """How large the model and its batches are."""

    layers: int
    heads: int
    width: int
    context: int
    batch: int
    epoch_batches: int


SIZES = {
    "tiny": Size(layers=2, heads=2, width=64, context=32, batch=4, epoch_batches=8),
    "small": Size(layers=4, heads=4, width=256, context=64, batch=8, epoch_batches=25),
    "large": Size(layers=6, heads=6, width=384, context=64, batch=8, epoch_batches=25),
    "bench": Size(layers=7, heads=12, width=768, context=64, batch=4, epoch_batches=25),
    "huge": Size(layers=7, heads=12, width=1536, context=64, batch=4, epoch_batches=25),
}
"""State with AdamW's moments: tiny 1.4 MB, small 39 MB, large 129 MB, bench 0.6 GB, huge 2.4 GB."""


def read_text(limit_bytes: int = TEXT_SIZE_BYTES) -> bytes:
    """The help texts of ``pydoc`` and the standard library's sources, in a fixed order, cut at ``limit_bytes``."""
    pieces = [text.encode() for _, text in sorted(pydoc_data.topics.topics.items())]
    size_bytes = sum(map(len, pieces))
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if size_bytes >= limit_bytes:
            break
        with suppress(OSError):  # a source we may not read is one we do without, in every run alike
            pieces.append(path.read_bytes())
            size_bytes += len(pieces[-1])
    return b"".join(pieces)[:limit_bytes]


class ShuffledWindows:
    """Endless batches of windows of a text, every epoch in a new order.

    It knows where it is: ``load_state_dict(state_dict())`` goes on with exactly the next batch.

    Attributes:
        epoch: the epoch of the last finished batch, counted from 1; 0 before the first batch.
        batch: that batch, counted from 1 within its epoch.
    """

    def __init__(self, text: bytes, size: Size, seed: int) -> None:
        self._text = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self._size = size
        self._windows = (len(text) - 1) // size.context
        self._generator = torch.Generator().manual_seed(seed)
        self._order = torch.empty(0, dtype=torch.int64)
        self.epoch = 0
        self.batch = 0

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Tokens and the tokens that follow them, both int64 of shape (batch, context)."""
        if self.batch * self._size.batch >= len(self._order):
            length = min(self._size.epoch_batches * self._size.batch, self._windows)
            self._order = torch.randperm(self._windows, generator=self._generator)[:length]
            self.epoch += 1
            self.batch = 0
        chosen = self._order[self.batch * self._size.batch :][: self._size.batch]
        self.batch += 1
        places = chosen[:, None] * self._size.context + torch.arange(self._size.context + 1)
        tokens = self._text[places].long()
        return tokens[:, :-1], tokens[:, 1:]

    def state_dict(self) -> dict[str, Any]:
        generator = self._generator.get_state()
        return {"epoch": self.epoch, "batch": self.batch, "order": self._order.clone(), "generator": generator}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch = state["epoch"]
        self.batch = state["batch"]
        self._order = state["order"].clone()
        self._generator.set_state(state["generator"])


class LossCurve:
    """The loss of every step so far: part of the state, so that it survives kills without holes or repeats."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self.losses)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.losses = list(state["losses"])


class Block(nn.Module):
    """Attention and a feed-forward layer, each behind a norm and beside a residual."""

    def __init__(self, size: Size, dropout: float) -> None:
        super().__init__()
        self.heads = size.heads
        self.dropout = dropout
        self.norm_attention = nn.LayerNorm(size.width)
        self.project_in = nn.Linear(size.width, 3 * size.width)
        self.project_out = nn.Linear(size.width, size.width)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(size.width),
            nn.Linear(size.width, 4 * size.width),
            nn.GELU(),
            nn.Linear(4 * size.width, size.width),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        projected = self.project_in(self.norm_attention(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = projected.permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        x = x + self.project_out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.feed_forward(x)  # type: ignore[no-any-return]  # nn.Module calls are untyped


class GPT(nn.Module):
    """A decoder-only transformer over bytes. The token embedding is also the output layer (one tensor, two names)."""

    def __init__(self, size: Size, dropout: float = 0.1) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, size.width)
        self.positions = nn.Embedding(size.context, size.width)
        self.blocks = nn.Sequential(*(Block(size, dropout) for _ in range(size.layers)))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, VOCABULARY, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))  # type: ignore[no-any-return]  # nn.Module calls are untyped


class Training:
    """Everything that changes while training: model, optimizer, schedule, loader, loss curve."""

    def __init__(self, size: Size, steps: int) -> None:
        torch.set_num_threads(THREADS)
        torch.use_deterministic_algorithms(True)
        torch.manual_seed(SEED)
        random.seed(SEED)
        warmup = max(1, steps // 10)

        def rate(step: int) -> float:
            """Linear warm-up, then a cosine down to a tenth."""
            if step < warmup:
                return (step + 1) / warmup
            return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))

        self.model = GPT(size)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rate)
        self.loader = ShuffledWindows(read_text(), size, SEED)
        self.curve = LossCurve()

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold. The random generators are the engine's business (``rng=True``)."""
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "loader": self.loader,
            "curve": self.curve,
        }

    def update(self) -> float:
        """Train on one batch; its loss."""
        tokens, following = self.loader.next_batch()
        loss = F.cross_entropy(self.model(tokens).flatten(0, 1), following.flatten())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # PyTorch leaves it untyped
        self.optimizer.step()
        self.scheduler.step()
        self.curve.losses.append(loss.item())
        return self.curve.losses[-1]

    @property
    def steps_done(self) -> int:
        return len(self.curve.losses)


def train(chain: str, size: Size, steps: int, every_steps: int, report: Report) -> Training:
    """Train up to ``steps``, snapshotting into ``chain``; goes on where an earlier run of any fate left off."""
    training = Training(size, steps)
    with Checkpointer(chain, training.state(), every_steps=every_steps) as checkpointer:
        progress = checkpointer.restore()
        report(f"started {progress.step if progress else 0}")
        while training.steps_done < steps:
            loss = training.update()
            report(f"step {training.steps_done} {loss:.4f}")
            pending = checkpointer.step(
                epoch=training.loader.epoch, batch=training.loader.batch, metrics={"loss": loss}
            )
            if pending is not None:
                report(f"snapshot {pending.step}")
                pending.add_done_callback(lambda done: report(f"{done.phase} {done.step}"))
    return training


def train_uninterrupted(size: Size, steps: int, report: Report) -> Training:
    """The same training without the engine: what the interrupted one must equal."""
    training = Training(size, steps)
    report("started 0")
    while training.steps_done < steps:
        loss = training.update()
        report(f"step {training.steps_done} {loss:.4f}")
    return training


def digest(value: Any) -> str:
    """SHA-256 over every bit of a state tree, order and types included. Independent of the engine's own digests."""
    hasher = hashlib.sha256()

    def feed(value: Any) -> None:
        if isinstance(value, Tensor):
            hasher.update(f"tensor {value.dtype} {tuple(value.shape)}\n".encode())
            hasher.update(value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, Mapping):
            hasher.update(f"mapping {len(value)}\n".encode())
            for key, item in value.items():
                feed(key)
                feed(item)
        elif isinstance(value, (list, tuple)):
            hasher.update(f"{type(value).__name__} {len(value)}\n".encode())
            for item in value:
                feed(item)
        elif isinstance(value, float):
            hasher.update(f"float {value.hex()}\n".encode())
        elif value is None or isinstance(value, (bool, int, str)):
            hasher.update(f"{type(value).__name__} {value!r}\n".encode())
        else:
            raise TypeError(f"no digest for a {type(value).__name__}: add its type to this function")

    feed(value)
    return hasher.hexdigest()


def digests(training: Training) -> dict[str, str]:
    """What two runs are compared by, part for part."""
    return {
        "parameters": digest(training.model.state_dict()),
        "optimizer": digest(training.optimizer.state_dict()),
        "scheduler": digest(training.scheduler.state_dict()),
        "loader": digest(training.loader.state_dict()),
        "rng": digest([torch.get_rng_state(), random.getstate()]),
        "loss_curve": digest(training.curve.losses),
    }


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of this program."""
    parser = argparse.ArgumentParser(
        prog="python -m ciuic_async.cli.demo_training", description="Train a small GPT, with or without snapshots."
    )
    parser.add_argument("--chain", help="snapshot into this chain, and go on from it; without: no snapshots at all")
    parser.add_argument("--size", choices=sorted(SIZES), default="small")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=5, metavar="STEPS", help="steps from one snapshot to the next")
    return parser.parse_args(arguments)


def main() -> None:
    """Train, report each step on a line of its own, and at last what came out."""
    options = parse_arguments()
    size = SIZES[options.size]
    moments_s: list[float] = []

    def report(line: str) -> None:
        """One write is one whole line, also when a background thread reports at the same moment."""
        if line.startswith("step "):
            moments_s.append(time.perf_counter())
        os.write(1, f"{line}\n".encode())

    if options.chain is None:
        training = train_uninterrupted(size, options.steps, report)
    else:
        training = train(options.chain, size, options.steps, options.every, report)
    steps_s = [after - before for before, after in itertools.pairwise(moments_s)]
    result = {
        "digests": digests(training),
        "loss": training.curve.losses[-1],
        "parameters": sum(parameter.numel() for parameter in training.model.parameters()),
        "step_s": statistics.median(steps_s) if steps_s else None,
    }
    report(f"done {json.dumps(result)}")


if __name__ == "__main__":
    main()
