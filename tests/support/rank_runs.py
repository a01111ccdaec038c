"""One step of an attached model on 1, 2 and 4 ranks, data-parallel (DDP) and sharded (FSDP2), on the CPU.

``python -m tests.support.rank_runs FOLDER`` writes, for each number of ranks and each rank, the masks, the
loss and the gradients of every case into ``FOLDER/<ranks>-<rank>.safetensors``, under names ``case|loss``,
``case|grad|<parameter>`` and ``case|mask|<site>|<call>``. Ranks are forks of this process, which has only
imported what they need.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers.models.gpt2.modeling_gpt2
import transformers.models.llama.modeling_llama  # noqa: F401
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import twodice
from tests.support.masks import masks_seen
from tests.support.tiny_models import ROWS, loss_of, tiny_model, tokens

EVERY = (
    "embedding=0.1, token=0.1, word=0.1, attention=0.1, key=0.1, head=0.1, residual=0.1, activation=0.1, "
    "skip=0.1, layer=0.1, output=0.1, weight=0.1"
)
WHOLE = "layer:batch=0.5, residual=0.1"
#: Name -> (family, plan, wrapper, number of micro-batches, activation checkpointing).
CASES: dict[str, tuple[str, str, str, int, bool]] = {
    "gpt2 ddp": ("gpt2", EVERY, "ddp", 1, False),
    "gpt2 fsdp2": ("gpt2", EVERY, "fsdp2", 1, False),
    "gpt2 ddp micro": ("gpt2", EVERY, "ddp", 2, False),
    "llama ddp checkpoint": ("llama", EVERY, "ddp", 1, True),
    "llama fsdp2": ("llama", EVERY, "fsdp2", 1, False),
    "llama fsdp2 checkpoint": ("llama", EVERY, "fsdp2", 2, True),
    "gpt2 ddp whole layers": ("gpt2", WHOLE, "ddp", 1, False),
    "llama fsdp2 whole layers": ("llama", WHOLE, "fsdp2", 1, False),
}
#: In this step one of the two layers is left out, in both families.
STEP = 0


def blocks(model: Any) -> Any:
    """Return the layers of a tiny model."""
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def run(name: str, world: int, rank: int) -> dict[str, torch.Tensor]:
    """Return what one case gives on one rank."""
    family, plan, wrapper, micros, checkpointed = CASES[name]
    model = called = tiny_model(family)
    if checkpointed:
        model.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    if world > 1 and wrapper == "ddp":
        called = DistributedDataParallel(model)
    elif world > 1:
        mesh = init_device_mesh("cpu", (world,))
        for block in blocks(model):
            fully_shard(block, mesh=mesh)
        called = fully_shard(model, mesh=mesh)
    handle = twodice.attach(called, plan, seed=11)
    rows = ROWS // world // micros
    total = torch.zeros(())
    with pytest.MonkeyPatch.context() as patch, masks_seen(patch) as seen:
        for micro in range(micros):
            slots = (micro * world + rank) * rows + torch.arange(rows)
            waits = micro < micros - 1 and world > 1
            if waits and wrapper == "fsdp2":
                called.set_requires_gradient_sync(False)
            context = called.no_sync() if waits and wrapper == "ddp" else contextlib.nullcontext()
            with context, handle.step(STEP, examples=slots):
                part = loss_of(called, tokens()[slots]) / micros
                part.backward()
            if waits and wrapper == "fsdp2":
                called.set_requires_gradient_sync(True)
            total += part.detach()
    handle.detach()
    if world > 1:
        dist.all_reduce(total)
    found = {f"{name}|loss": total / world}
    for parameter, p in model.named_parameters():
        grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        found[f"{name}|grad|{parameter}"] = grad.clone()
    for site, masks in seen.items():
        for call, mask in enumerate(masks):
            found[f"{name}|mask|{site}|{call}"] = mask.contiguous()
    return found


def work(folder: Path, world: int, rank: int) -> None:
    """Be one rank."""
    if world > 1:
        store = dist.FileStore(str(folder / f"meet-{world}"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    found: dict[str, torch.Tensor] = {}
    for name in CASES:
        found |= run(name, world, rank)
    save_file(found, folder / f"{world}-{rank}.safetensors")
    if world > 1:
        dist.destroy_process_group()


def main(folder: Path) -> None:
    """Do what the module's docstring says."""
    torch.set_num_threads(1)
    for world in (1, 2, 4):
        children = []
        for rank in range(world):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                child = os.fork()
            if child == 0:
                status = 1
                try:
                    work(folder, world, rank)
                    status = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(status)
            children.append(child)
        failed = [child for child in children if os.waitpid(child, 0)[1]]
        if failed:
            raise SystemExit(f"{len(failed)} of {world} ranks failed")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
