"""A training script as a stranger would write it after reading the README, with everything that is easy to get wrong.

Dropout, BatchNorm (its statistics change in the forward pass), a moving average of the weights, OneCycleLR, a loader of
its own that shuffles, and augmentation that draws from numpy's and Python's generators. The engine is used by the three
lines between ``with`` and ``checkpointer.step``; nothing else knows of it.

Usage: ``stranger_training.py CHAIN STEPS SEED``. Prints ``step N`` after every step, ``snapshot N`` when one was taken,
and at the end one line of JSON: digests of everything that must not depend on how often the process was killed.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ciuic_async import Checkpointer


class Loader:
    """Batches of a small synthetic data set, in a new order each epoch, flipped and shaken at random."""

    def __init__(self, seed: int, batch_size: int = 8) -> None:
        generator = np.random.default_rng(seed)
        self.images = generator.normal(size=(56, 3, 12, 12)).astype(np.float32)
        self.labels = self.images.mean(axis=(1, 2, 3)) > 0
        self.batch_size = batch_size
        self.order: list[int] = []
        self.epoch = 0
        self.batch = 0

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.order:
            self.order = list(range(len(self.images)))
            random.shuffle(self.order)
            self.epoch += 1
            self.batch = 0
        picked, self.order = self.order[: self.batch_size], self.order[self.batch_size :]
        self.batch += 1
        images = self.images[picked]
        if random.random() < 0.5:
            images = images[..., ::-1]
        images = images + np.random.normal(scale=0.05, size=images.shape).astype(np.float32)
        return torch.from_numpy(images), torch.from_numpy(self.labels[picked]).long()

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.order, "epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order = state["order"]
        self.epoch = state["epoch"]
        self.batch = state["batch"]


def digest(value: Any) -> str:
    """A digest of a nested state, exact to the bit."""
    hasher = hashlib.sha256()

    def feed(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu().numpy()
        if isinstance(value, np.ndarray):
            hasher.update(f"{value.dtype}{value.shape}".encode())
            hasher.update(value.tobytes())
        elif isinstance(value, dict):
            for key, item in value.items():
                hasher.update(repr(key).encode())
                feed(item)
        elif isinstance(value, (list, tuple)):
            hasher.update(f"{type(value).__name__}{len(value)}".encode())
            for item in value:
                feed(item)
        else:
            hasher.update(repr(value).encode())

    feed(value)
    return hasher.hexdigest()


def main(chain: str, steps: int, seed: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)

    model = nn.Sequential(
        nn.Conv2d(3, 32, 3),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Flatten(),
        nn.Linear(32 * 100, 64),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(64, 2),
    )
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
    loader = Loader(seed)
    losses: list[float] = []

    state = {
        "model": model,
        "ema": ema,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "loader": loader,
        "losses": losses,
    }
    with Checkpointer(chain, state, every_steps=3) as checkpointer:
        progress = checkpointer.restore()
        for step in range(progress.step if progress else 0, steps):
            images, labels = next(loader)
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            ema.update_parameters(model)
            losses.append(loss.item())
            print(f"step {step + 1}", flush=True)
            pending = checkpointer.step(epoch=loader.epoch, batch=loader.batch, metrics={"loss": losses[-1]})
            if pending is not None:
                print(f"snapshot {pending.step}", flush=True)

    print(
        json.dumps(
            {
                "model": digest(model.state_dict()),
                "ema": digest(ema.state_dict()),
                "optimizer": digest(optimizer.state_dict()),
                "scheduler": digest(scheduler.state_dict()),
                "loader": digest(loader.state_dict()),
                "losses": digest(losses),
                "random": digest([random.getstate(), np.random.get_state(), torch.get_rng_state()]),
                "step_count": len(losses),
            }
        ),
        flush=True,
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
