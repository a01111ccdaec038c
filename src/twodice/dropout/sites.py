"""Where a model can drop units: the table of families, the search for sites, and the dropout that a model
brings along.

Reads a model, never changes it. Knows no rate of a plan and no key. A site's name is ``<module
path>#<kind>``; wrappers (data-parallel, compiled, checkpointed, adapters) are taken off by type and leave no
trace in a path.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
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


@dataclass(frozen=True)
class Family:
    """How the models of one family are built: names of attributes, and what each own dropout feeds.

    Attributes
    ----------
    home, base : str
        Module and class of the base model.
    layers, attention, mlp, last, norm : str
        The list of blocks; in a block its attention and feed-forward; the feed-forward's last linear; the
        final norm.
    own : dict
        Path in a block (or, with a leading dot, in the base) of an own ``nn.Dropout`` -> the kind that its
        tensor is.
    read : dict
        Field of the config -> what reads it.
    """

    home: str
    base: str
    layers: str
    attention: str
    mlp: str
    last: str
    norm: str
    own: dict[str, str]
    read: dict[str, str]


def _llama(model: str, name: str) -> Family:
    return Family(
        home=f"transformers.models.{model}.modeling_{model}",
        base=name,
        layers="layers",
        attention="self_attn",
        mlp="mlp",
        last="down_proj",
        norm="norm",
        own={},
        read={"attention_dropout": "the attention function"},
    )


FAMILIES = (
    Family(
        home="transformers.models.gpt2.modeling_gpt2",
        base="GPT2Model",
        layers="h",
        attention="attn",
        mlp="mlp",
        last="c_proj",
        norm="ln_f",
        own={
            ".drop": "embedding",
            "attn.attn_dropout": "attention",
            "attn.resid_dropout": "residual.attention",
            "mlp.dropout": "residual.mlp",
        },
        read={
            "embd_pdrop": "drop",
            "attn_pdrop": "attn_dropout",
            "resid_pdrop": "resid_dropout and mlp.dropout",
        },
    ),
    _llama("llama", "LlamaModel"),
    _llama("mistral", "MistralModel"),
    _llama("qwen2", "Qwen2Model"),
)


@dataclass(frozen=True)
class Place:
    """One site that a plan may speak of.

    Attributes
    ----------
    name : str
        ``<module path>#<kind>``: what the key is derived from.
    kind : str
        Kind of the plan.
    path : str
        Clean path of the module that the site belongs to.
    part : str or None
        ``attention`` or ``mlp`` for ``residual``.
    layer : int or None
        Number of the block.
    module : nn.Module
        Where the hook goes.
    tensor : str
        ``input`` (first argument), ``output`` (the result, or the first of several) or ``attention``.
    layout : str or None
        Axes, None where only the shape at run time tells.
    """

    name: str
    kind: str
    path: str
    part: str | None
    layer: int | None
    module: nn.Module
    tensor: str
    layout: str | None
    stack: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OwnDropout:
    """Dropout that the model brings along.

    ``feeds`` is the name of the site whose tensor it drops, or None; ``called`` says that the module runs
    (GPT-2's ``attn_dropout`` only carries a number for the attention function).
    """

    path: str
    module: nn.Module
    rate: float
    feeds: str | None
    attribute: str = "p"
    called: bool = True


@dataclass
class Inventory:
    """What was found in a model."""

    root: nn.Module
    base: nn.Module
    family: Family | None
    layers: int | None
    places: list[Place] = field(default_factory=list)
    own: list[OwnDropout] = field(default_factory=list)
    phantoms: list[tuple[str, float, str]] = field(default_factory=list)

    @property
    def kinds(self) -> list[str]:
        """Kinds that have a site here, in the order of the plan."""
        return list(dict.fromkeys(place.kind for place in self.places))


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


def walk(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (clean path, module) of everything inside `root`, each module once, under its first path."""
    seen: set[int] = set()

    def inside(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        module = unwrap(module)
        if id(module) in seen:
            return
        seen.add(id(module))
        yield path, module
        for name, child in module.named_children():
            yield from inside(child, f"{path}.{name}" if path else name)

    yield from inside(root, "")


def _family_of(module: nn.Module) -> Family | None:
    for family in FAMILIES:
        kind = getattr(sys.modules.get(family.home), family.base, None)
        if kind is not None and isinstance(module, kind):
            return family
    return None


def _at(module: nn.Module, path: str) -> nn.Module:
    for name in path.split("."):
        module = unwrap(getattr(unwrap(module), name))
    return module


def find(model: nn.Module) -> Inventory:
    """Return the sites of a model and the dropout that it brings along.

    Raises
    ------
    ConfigError
        If the model holds two base models of a known family, or is of a form that cannot be served.
    """
    root = unwrap(model)
    modules = list(walk(root))
    bases = [(path, module, family) for path, module in modules if (family := _family_of(module)) is not None]
    if len(bases) > 1:
        raise ConfigError(
            f"attach serves one language model at a time; found {', '.join(repr(p) for p, _, _ in bases)}; "
            "attach to each"
        )
    if not bases:
        found = Inventory(root, root, None, None)
    else:
        path, base, family = bases[0]
        if getattr(getattr(base, "config", None), "add_cross_attention", False):
            raise ConfigError(
                f"{type(base).__name__} with cross-attention is not served yet; got add_cross_attention=True"
            )
        blocks = [unwrap(block) for block in getattr(base, family.layers)]
        found = Inventory(root, base, family, len(blocks))
        _sites_of_family(found, path, blocks)
    _sites_of_modules(found, modules)
    _phantoms(found)
    return found


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _sites_of_family(found: Inventory, path: str, blocks: list[nn.Module]) -> None:
    family, base = found.family, found.base
    assert family is not None

    def add(
        kind: str, at: str, module: nn.Module, tensor: str, layer: int | None = None, part: str | None = None
    ) -> None:
        layout = "bhts" if tensor == "attention" else "btc"
        found.places.append(Place(f"{at}#{kind}", kind, at, part, layer, module, tensor, layout))

    add("embedding", path, blocks[0], "input")
    for layer, block in enumerate(blocks):
        at = _join(path, family.layers, str(layer))
        attention, mlp = _join(at, family.attention), _join(at, family.mlp)
        add("attention", attention, _at(block, family.attention), "attention", layer)
        add("residual", attention, _at(block, family.attention), "output", layer, "attention")
        add("activation", mlp, _at(block, f"{family.mlp}.{family.last}"), "input", layer)
        add("residual", mlp, _at(block, family.mlp), "output", layer, "mlp")
    add("output", _join(path, family.norm), _at(base, family.norm), "output")

    def site(kind: str, layer: int | None) -> str:
        name, _, part = kind.partition(".")
        return next(
            p.name
            for p in found.places
            if p.kind == name and p.layer == layer and (not part or p.part == part)
        )

    for where, kind in family.own.items():
        holders: list[tuple[int | None, nn.Module]] = (
            [(None, base)] if where.startswith(".") else [*enumerate(blocks)]
        )
        for number, block in holders:
            at = _join(path, where[1:]) if number is None else _join(path, family.layers, str(number), where)
            own = _at(block, where.removeprefix("."))
            called = kind != "attention"
            # A model may be built with something else in this place (nn.Identity, say): then there is nothing
            # to tell.
            if isinstance(own, nn.Dropout):
                found.own.append(OwnDropout(at, own, own.p, site(kind, number), called=called))
    if "attention_dropout" in family.read:
        for layer, block in enumerate(blocks):
            own = _at(block, family.attention)
            at = _join(path, family.layers, str(layer), family.attention)
            rate = float(getattr(own, "attention_dropout", 0.0))
            found.own.append(
                OwnDropout(at, own, rate, site("attention", layer), "attention_dropout", called=False)
            )


def _sites_of_modules(found: Inventory, modules: list[tuple[str, nn.Module]]) -> None:
    """Each nn.Dropout that runs as a module is a site of the kind `dropout`."""
    known = {id(own.module): own for own in found.own}
    for path, module in modules:
        if isinstance(module, nn.Dropout):
            own = known.get(id(module))
            if own is None:
                found.own.append(OwnDropout(path, module, module.p, None))
            elif not own.called:
                continue
            found.places.append(Place(f"{path}#dropout", "dropout", path, None, None, module, "output", None))
        elif isinstance(module, nn.modules.dropout._DropoutNd):
            found.own.append(OwnDropout(path, module, module.p, None))
        elif isinstance(module, nn.MultiheadAttention | nn.RNNBase) and module.dropout > 0:
            found.own.append(OwnDropout(path, module, float(module.dropout), None, "dropout"))


def _phantoms(found: Inventory) -> None:
    """Rates in the config that nothing in this model reads."""
    config = getattr(found.base, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        return
    read: dict[str, str] = found.family.read if found.family is not None else {}
    values: dict[str, Any] = config.to_dict()
    for name, value in sorted(values.items()):
        if (
            not re.search("drop", name)
            or isinstance(value, bool)
            or not isinstance(value, int | float)
            or value <= 0
        ):
            continue
        if name not in read and found.family is not None:
            if name == "summary_first_dropout" and any("first_dropout" in own.path for own in found.own):
                continue
            found.phantoms.append(
                (name, float(value), f"no module of this {type(found.root).__name__} reads it")
            )


def has_fast_path(root: nn.Module) -> bool:
    """Whether an eval fast path in `root` would be switched off by the mere presence of hooks."""
    return any(isinstance(m, nn.TransformerEncoder | nn.TransformerEncoderLayer) for m in root.modules())


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The tensor whose first axis counts the rows of a forward: the first argument that is one."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            return value
    return None
