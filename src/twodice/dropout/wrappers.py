"""Wrappers around modules, taken off by type, and clean paths: no wrapper leaves a trace in a site's name.

Knows no form of model.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from torch import nn

from twodice.errors import ConfigError

#: Wrappers by type: (module, class, attribute that holds what is wrapped). A module that is not loaded has no
#: instance.
WRAPPERS = (
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    ("torch.nn.parallel.distributed", "DistributedDataParallel", "module"),
    ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel", "module"),
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "CheckpointWrapper",
        "_checkpoint_wrapped_module",
    ),
    ("peft.peft_model", "PeftModel", "base_model"),
    ("peft.tuners.tuners_utils", "BaseTuner", "model"),
)
#: Layers that stand in for another and call it: (module, class, attribute that holds the other). They are
#: modules of their own (adapters drop their own input), but the other one keeps their path.
STAND_INS = (
    ("peft.tuners.tuners_utils", "BaseTunerLayer", "base_layer"),
    ("peft.utils.other", "AuxiliaryTrainingWrapper", "original_module"),
)


def unwrap(module: nn.Module) -> nn.Module:
    """Return what is inside the wrappers, which are known by type."""
    if isinstance(module, nn.DataParallel):
        raise ConfigError(
            "nn.DataParallel copies the model on every forward, so that its sites cannot be reached; use "
            "DistributedDataParallel"
        )
    while True:
        for home, name, attribute in WRAPPERS:
            kind = getattr(sys.modules.get(home), name, None)
            if kind is not None and isinstance(module, kind):
                module = getattr(module, attribute)
                break
        else:
            return module


def stood_in(module: nn.Module) -> str | None:
    """Return the attribute under which a stand-in (an adapter's layer) holds the layer itself; None for any
    other.
    """
    for home, name, attribute in STAND_INS:
        kind = getattr(sys.modules.get(home), name, None)
        if (
            kind is not None
            and isinstance(module, kind)
            and isinstance(getattr(module, attribute, None), nn.Module)
        ):
            return attribute
    return None


def walk(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (clean path, module) of everything inside `root`, each module once, under its first path."""
    seen: set[int] = set()

    def inside(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        module = unwrap(module)
        if id(module) in seen:
            return
        seen.add(id(module))
        yield path, module
        held = stood_in(module)
        for name, child in module.named_children():
            yield from inside(child, path if name == held else join(path, name))

    yield from inside(root, "")


def join(*parts: str) -> str:
    """Return a dotted path of the parts that are not empty."""
    return ".".join(part for part in parts if part)


def child(module: nn.Module, name: str) -> object:
    """Return what a module, freed of wrappers, holds under a name (a number in a list); None where it holds
    nothing.
    """
    module = unwrap(module)
    found = module._modules.get(name, getattr(module, name, None))
    if found is None:
        held = stood_in(module)
        if held is not None:
            return child(getattr(module, held), name)
    return unwrap(found) if isinstance(found, nn.Module) else found


def at(module: nn.Module, path: str) -> object:
    """Return what lies at a dotted path below a module; the module itself for ``""``, None for nothing."""
    found: object = unwrap(module)
    for name in path.split(".") if path else ():
        found = child(found, name) if isinstance(found, nn.Module) else getattr(found, name, None)
    return found


def module_at(module: nn.Module, path: str) -> nn.Module | None:
    """Return the module at a dotted path, None where there is none."""
    found = at(module, path)
    return found if isinstance(found, nn.Module) else None
