"""What the code of a model's classes reads and calls, found in its compiled functions.

A rate in a config that no class of the model ever names is a phantom; an attribute with a rate that a forward
names is a functional dropout; a forward that names a random function is chance outside the plan. Names alone
are read: nothing is run, and no source file is needed. Knows no table and no site.
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Iterator

from torch import nn

#: Modules whose classes every model inherits from: what their code names says nothing about a model.
_SHARED = (
    "torch.",
    "builtins",
    "peft",
    "abc",
    "typing",
    "transformers.modeling_",
    "transformers.generation",
    "transformers.integrations",
    "transformers.utils",
)
#: Methods that run when a model is made, not in a forward.
_MAKING = re.compile(r"__\w+__|_?init_?\w*|reset_parameters|post_init")
RANDOM = frozenset(
    (
        "rand", "randn", "rand_like", "randn_like", "randint", "randperm", "bernoulli", "bernoulli_",
        "uniform_", "normal_", "exponential_", "multinomial", "uniform", "random", "_compute_mask_indices",
    )
)  # fmt: skip
RATE = re.compile(r"(?:^|_)p?drop(?:out)?(?:$|_)|dropout|pdrop")


_NAMED: dict[tuple[type, bool], frozenset[str]] = {}


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
        elif isinstance(constant, str) and constant.isidentifier():
            yield constant


def _functions(kind: type) -> Iterator[tuple[str, types.FunctionType]]:
    for parent in kind.__mro__:
        if parent.__module__.startswith(_SHARED):
            continue
        for name, value in vars(parent).items():
            function = value.fget if isinstance(value, property) else value
            function = inspect.unwrap(function) if callable(function) else function
            if isinstance(function, types.FunctionType):
                yield name, function


def _named(kind: type, making: bool) -> frozenset[str]:
    known = _NAMED.get((kind, making))
    if known is None:
        known = _NAMED[kind, making] = frozenset(
            name
            for method, function in _functions(kind)
            if making or not _MAKING.fullmatch(method)
            for name in _names(function.__code__)
        )
    return known


def named_in(kind: type) -> frozenset[str]:
    """Return every name that the code of a class uses, making included."""
    return _named(kind, True)


def named_in_forward(kind: type) -> frozenset[str]:
    """Return every name that a class uses after it was made."""
    return _named(kind, False)


def asks_for_attention(module: nn.Module) -> bool:
    """Whether a module calls the attention function that its config names."""
    return hasattr(module, "config") and "ALL_ATTENTION_FUNCTIONS" in named_in_forward(type(module))


def rates_read(module: nn.Module) -> dict[str, float]:
    """Return the attributes of a module that hold a rate and that its forward reads."""
    if type(module).__module__.startswith("torch."):
        return {}
    read = named_in_forward(type(module))
    return {
        name: float(value)
        for name, value in vars(module).items()
        if isinstance(value, int | float)
        and not isinstance(value, bool)
        and name in read
        and RATE.search(name)
        and "layer" not in name
    }


def random_calls(module: nn.Module) -> list[str]:
    """Return the random functions that a module's forward names, sorted."""
    if type(module).__module__.startswith("torch."):
        return []
    return sorted(RANDOM & named_in_forward(type(module)))
