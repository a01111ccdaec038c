"""The dropout that a model brings along: modules, rates kept as attributes, rates that nothing reads, and
chance of other kinds.

Each rate is told with the site whose tensor it drops, so that it can be switched off where a plan speaks of
that site. Knows no plan.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from twodice.dropout import reading, table
from twodice.dropout.places import Inventory, OwnDropout, Place
from twodice.dropout.stacks import Stack
from twodice.dropout.wrappers import at, join, module_at, stood_in

#: Names in a forward that reach children in ways that names do not show.
_BY_OTHER_MEANS = frozenset(("getattr", "children", "named_children", "modules", "_modules", "__dict__"))

#: Modules that drop whole channels -> the axes of what they are given.
_CHANNELS = {nn.Dropout1d: "bct", nn.Dropout2d: "bchw"}
#: Modules of an nn.Sequential behind which a tensor has the axes that it had before, in this order.
_KEEPS_AXES = (
    nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.ELU, nn.Identity, nn.GroupNorm,
    nn.BatchNorm1d, nn.BatchNorm2d, nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.modules.dropout._DropoutNd,
)  # fmt: skip


def of_form(found: Inventory, stack: Stack, where: dict[int, str]) -> None:
    """Record the own rates that the row of a stack names."""
    assert stack.form is not None
    for named, kinds in stack.form.own.items():
        if named[0] in ".^":
            _one(found, stack, None, stack.owner if named[0] == "." else stack.base, named[1:], kinds, where)
        else:
            for layer, block in enumerate(stack.blocks):
                _one(found, stack, layer, block, named, kinds, where)


def _one(
    found: Inventory,
    stack: Stack,
    layer: int | None,
    start: nn.Module,
    named: str,
    kinds: tuple[str, ...],
    where: dict[int, str],
) -> None:
    above, _, attribute = named.rpartition(".")
    value = at(start, named)
    feeds = [site for kind in kinds for site in _sites(found, stack, kind, layer)]
    names = tuple(site.name for site in feeds)
    module, through, called = start, None, False
    if isinstance(value, nn.Dropout):
        if id(value) in found.silent:
            return
        inside = ("attention", "multihead")
        called = not (feeds and all(s.kind == "attention" and s.tensor in inside for s in feeds))
        module, attribute, rate = value, "p", value.p
    elif isinstance(value, int | float) and not isinstance(value, bool):
        if above == "config" or above.endswith(".config"):
            above, through = above.rpartition(".")[0], "config"
        holder = module_at(start, above)
        assert holder is not None
        kind = type(holder)
        if not kind.__module__.startswith("torch.") and attribute not in reading.named_in_forward(kind):
            return  # OPT's decoder keeps a rate for its embedding and never drops it
        module, rate = holder, float(value)
    else:
        return  # nothing in this place, or nn.Identity
    shared = names if len(names) > 1 else ()
    for name in names or (None,):
        found.own.append(
            OwnDropout(where[id(module)], module, rate, name, attribute, called, shared, through)
        )
    for site in feeds:
        # What lies inside the branch's module is part of the branch; the rest comes between it and the sum.
        inner = where[id(module)].startswith(f"{where[id(site.module)]}.")
        if site.kind == "residual" and not inner:
            for skip in found.places:
                if skip.kind == "skip" and skip.path == site.path:
                    skip.extra["between"] += ((module, attribute, through),)


def _sites(found: Inventory, stack: Stack, kind: str, layer: int | None) -> list[Place]:
    name, _, part = kind.partition(".")
    wanted = part or None
    return [
        place
        for place in found.places
        if place.kind == name
        and place.layer == layer
        and place.stack == stack.name
        and (place.part == wanted or (wanted is None and name not in ("attention", "residual")))
        and not (name == "activation" and place.tensor == "experts")
    ]


def _readers(modules: list[tuple[str, nn.Module]]) -> dict[int, nn.Linear]:
    """For the dropout (by id) of an adapter of LoRA's form: the matrix that alone reads what it gives."""
    found = {}
    for _, module in modules:
        adapter: Any = module
        if stood_in(module) is None or not (hasattr(module, "lora_A") and hasattr(module, "lora_dropout")):
            continue
        for name, dropout in adapter.lora_dropout.items():
            if name in adapter.lora_A and isinstance(adapter.lora_A[name], nn.Linear):
                found[id(dropout)] = adapter.lora_A[name]
    return found


def collect(found: Inventory, modules: list[tuple[str, nn.Module]]) -> None:
    """Record every other own dropout, the sites of the kind ``dropout``, phantoms and other chance."""
    _dead(found, modules)
    known = {(id(own.module), own.attribute) for own in found.own}
    quiet = {id(own.module) for own in found.own if not own.called} | set(found.silent)
    axes = _axes(modules)
    weights = {id(place.module) for place in found.places if place.tensor == "probabilities"}
    attended = {
        id(place.module): place.name
        for place in found.places
        if place.tensor == "attention" and place.kind == "attention"
    }
    readers = _readers(modules)
    for path, module in modules:
        if isinstance(module, nn.Dropout):
            why = found.silent.get(id(module))
            if why is not None:
                if module.p > 0:
                    found.phantoms.append((path, module.p, why))
                continue
            if (id(module), "p") not in known:
                called = id(module) not in found.silent
                found.own.append(OwnDropout(path, module, module.p, None, called=called))
            if id(module) not in quiet:
                layout = "bhts" if id(module) in weights else axes.get(id(module)) or _layout(found, path)
                extra = {} if id(module) not in readers else {"reader": readers[id(module)]}
                found.add("dropout", path, module, "output", layout=layout, extra=extra)
        elif isinstance(module, nn.modules.dropout._DropoutNd):
            found.own.append(OwnDropout(path, module, module.p, None))
            layout = _CHANNELS.get(type(module))
            if layout is None:
                what = f"{type(module).__name__} drops in a way that has no kind: left alone"
                found.undecided.append((path, what))
            else:
                found.add("dropout", path, module, "channels", layout=layout)
        elif isinstance(module, nn.MultiheadAttention | nn.RNNBase):
            if module.dropout > 0 and (id(module), "dropout") not in known:
                found.own.append(OwnDropout(path, module, float(module.dropout), None, "dropout"))
            if isinstance(module, nn.RNNBase) and module.num_layers > 1:
                flow = "btc" if module.batch_first else "tbc"
                found.add("dropout", path, module, "recurrent", layout=flow)
        else:
            for name, rate in reading.rates_read(module).items():
                if (id(module), name) not in known:
                    found.own.append(
                        OwnDropout(path, module, rate, attended.get(id(module)), name, called=False)
                    )
            _random(found, path, module)
    _phantoms(found, modules)


def _axes(modules: list[tuple[str, nn.Module]]) -> dict[int, str]:
    """Axes of the tensors that pass an nn.Dropout in an nn.Sequential, by the convolution before it."""
    found: dict[int, str] = {}
    for _, module in modules:
        if not isinstance(module, nn.Sequential):
            continue
        layout = None
        for child in module:
            if isinstance(child, nn.Conv1d | nn.Conv2d):
                layout = "bct" if isinstance(child, nn.Conv1d) else "bchw"
            elif isinstance(child, nn.Dropout):
                if layout is not None:
                    found[id(child)] = layout
            elif not isinstance(child, _KEEPS_AXES):
                layout = None
    return found


def _layout(found: Inventory, path: str) -> str | None:
    for stack in found.stacks:
        if stack.time_first and any(path.startswith(f"{block}.") for block in stack.paths):
            return "tbc"
    return None


def _dead(found: Inventory, modules: list[tuple[str, nn.Module]]) -> None:
    """Find each nn.Dropout that was made and that no code of its parent ever names again."""
    named = {id(own.module) for own in found.own}
    for path, parent in modules:
        kind = type(parent)
        if kind.__module__.startswith(("torch.", "peft.")) or isinstance(
            parent, nn.Sequential | nn.ModuleList | nn.ModuleDict
        ):
            continue
        read = reading.named_in_forward(kind)
        for name, child in parent.named_children():
            if isinstance(child, nn.Dropout) and id(child) not in named and name not in read:
                if not read & _BY_OTHER_MEANS:
                    found.silent[id(child)] = f"{join(path, name)!r} is made and never called"


def _phantoms(found: Inventory, modules: list[tuple[str, nn.Module]]) -> None:
    """Rates in the config that nothing in this model reads."""
    config = getattr(found.base, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        return
    read = {name for kind in {type(module) for _, module in modules} for name in reading.named_in(kind)}
    for name, value in sorted(config.to_dict().items()):
        if not re.search("drop", name) or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if value > 0 and name not in read:
            found.phantoms.append(
                (name, float(value), f"no module of this {type(found.root).__name__} reads it")
            )


def _random(found: Inventory, path: str, module: nn.Module) -> None:
    """Chance in a module's forward that is no dropout of a known kind."""
    calls = reading.random_calls(module)
    if not calls:
        return
    guards = {name: getattr(module, name) for name in table.GUARDS if hasattr(module, name)}
    if guards:
        for name, rate in guards.items():
            if isinstance(rate, int | float) and rate > 0:
                found.random.append((path, f"{table.GUARDS[name]}: {name}={rate}"))
    elif "_compute_mask_indices" in calls:
        config = getattr(module, "config", None)
        rates = {name: getattr(config, name, 0) for name in ("mask_time_prob", "mask_feature_prob")}
        if getattr(config, "apply_spec_augment", True) and any(rate > 0 for rate in rates.values()):
            told = ", ".join(f"{name}={rate}" for name, rate in rates.items())
            found.random.append((path, f"stretches of the input are masked (SpecAugment): {told}"))
    else:
        found.random.append((path, f"its forward calls {', '.join(calls)}"))
