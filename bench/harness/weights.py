"""Bytes worth compressing: trained weights, optimizer state, and how they move from one snapshot to the next."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from harness.lost import prepare_training
from harness.output import say

PACKAGE = "resemblyzer"
"""Ships the checkpoint of a speaker encoder (an LSTM, float32, Apache-2.0) with its Adam state after long training.
Only that file is read (17 MB), with ``weights_only``; nothing of the package is imported."""


def flat(tensors: Sequence[Tensor], limit_bytes: int) -> Tensor:
    """All elements one after the other, in order, cut at ``limit_bytes``."""
    joined = torch.cat([tensor.detach().flatten() for tensor in tensors])
    return joined[: limit_bytes // joined.element_size()].clone()


def trained_elsewhere(limit_bytes: int) -> dict[str, Tensor]:
    """Weights and moments of a package's checkpoint; empty where it is not installed."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        say(f"{PACKAGE} is not installed: no weights trained by others")
        return {}
    checkpoint = torch.load(Path(found.origin).parent / "pretrained.pt", map_location="cpu", weights_only=True)
    moments = list(checkpoint["optimizer_state"]["state"].values())
    weights = flat(list(checkpoint["model_state"].values()), limit_bytes)
    return {
        "weights, fp32": weights,
        "weights, bf16": weights.bfloat16(),
        "exp_avg": flat([moment["exp_avg"] for moment in moments], limit_bytes),
        "exp_avg_sq": flat([moment["exp_avg_sq"] for moment in moments], limit_bytes),
    }


def trajectory(size: str, steps: Sequence[int], threads: int, limit_bytes: int) -> dict[int, dict[str, Tensor]]:
    """Weights and AdamW moments of the demo's model at these steps of one training."""
    training = prepare_training(size, threads)
    found: dict[int, dict[str, Tensor]] = {}
    for step in range(training.steps_done, max(steps) + 1):
        if step in steps:
            parameters = list(training.model.parameters())
            moments = [training.optimizer.state[parameter] for parameter in parameters]
            weights = flat(parameters, limit_bytes)
            found[step] = {
                "weights, fp32": weights,
                "weights, bf16": weights.bfloat16(),
                "exp_avg": flat([moment["exp_avg"] for moment in moments], limit_bytes),
                "exp_avg_sq": flat([moment["exp_avg_sq"] for moment in moments], limit_bytes),
            }
            say(f"trained {step} steps, loss {training.curve.losses[-1]:.2f}")
        training.update()
    return found
