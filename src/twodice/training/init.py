"""The one file that may seed torch's own generator: initial weights, and a net under random calls outside the
plan.

Weights are drawn on the CPU, so that they are the same for every device, and are stored as the checkpoint of
step 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from twodice.random.keys import Key


@contextmanager
def generator_set_aside(device: torch.device | None = None) -> Iterator[None]:
    """Leave torch's generators, on leaving, as they were found on entering."""
    devices = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


def new_model(config: Any, seed: int) -> torch.nn.Module:
    """Make a causal language model from a transformers config, with initial weights drawn on the CPU in
    float32.

    Randomness
    ----------
    ``Key(seed).child("init")`` seeds torch's generator inside a fork; no other state is touched.
    """
    from transformers import AutoModelForCausalLM

    with generator_set_aside():
        torch.manual_seed(Key(seed).child("init").value)
        model: torch.nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


def reseed_net(key: Key, step: int, micro: int, rank: int) -> None:
    """Seed torch's generators for one micro-batch: the net under random calls that a model makes outside the
    plan.

    Randomness
    ----------
    ``key.child("net", step, micro, rank)``. To be called inside `generator_set_aside`.
    """
    torch.manual_seed(key.child("net", step, micro, rank).value)
