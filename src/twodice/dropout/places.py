"""What a search finds in a model: places where units can be dropped, own dropout, and what was left open.

Records only; `sites` fills them. Letters: B rows, T positions, C columns, H heads, S keys, N rows of a
flattened batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from twodice.dropout.stacks import Stack

#: The order in which kinds are named.
ORDER = (
    "embedding", "token", "word", "attention", "key", "head", "residual", "activation", "output", "layer",
    "skip", "weight", "dropout",
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """What the base model of a found model is: its module and class, for messages and for the eager road."""

    home: str
    base: str


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
        ``attention``, ``cross`` or ``mlp`` for ``residual`` and ``skip``; ``cross`` for ``attention``,
        ``key`` and ``head`` in cross-attention.
    layer : int or None
        Number of the block in its stack.
    module : nn.Module
        Where the hook goes.
    tensor : str
        ``input`` (first argument), ``output`` (the result, or the first of several), ``attention`` (the
        weights inside the attention function that the module's config names), ``probabilities`` (the input
        of an nn.Dropout that is called on the weights), ``multihead`` (the weights of an
        nn.MultiheadAttention), ``recurrent`` (between the layers of an nn.RNNBase), ``experts``
        (the input of the last product of stacked experts: `module` takes (N, C) rows, the experts' numbers
        (N, k) and their weights, runs each expert in a loop, and has no module at this tensor; its forward,
        or the function that its config's ``_experts_implementation`` names, must be put in place of it;
        a row keeps its example and position, column j of expert e is ``e * width + j``), ``lookup`` (rows of
        an nn.Embedding), ``block`` (a whole layer), ``skip`` (the stream beside a branch), ``channels``
        (the output of an nn.Dropout1d or 2d: one decision for a whole channel of an example), ``weight``
        (the parameter ``extra["parameter"]`` of the module).
    layout : str or None
        Axes, None where only the shape at run time tells.
    stack : str or None
        ``encoder`` or ``decoder`` in a model that has both.
    extra : dict
        ``heads`` (number of query heads, for ``head``, ``attention`` and ``key``); ``eager`` (the eager
        attention function of the module's own file); ``stream``, ``stream_is`` and ``between`` (for
        ``skip``: the module whose first argument is the stream, and the own rates, as (module, attribute),
        that lie between the branch and the sum); ``experts`` and ``width``; ``parameter`` and ``tied``
        (paths of other modules with the same parameter); ``reader`` (the matrix that alone reads what the
        dropout of an adapter gives).
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
    extra: dict[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class OwnDropout:
    """Dropout that the model brings along.

    ``feeds`` is the name of the site whose tensor it drops, or None; ``called`` says that the module runs
    (GPT-2's ``attn_dropout`` only carries a number for the attention function). A rate that feeds several
    sites (one attribute for all residuals of a block) stands once for each, and then ``shared`` names all.
    ``through`` is ``config`` where the rate is read from the module's config in each forward.
    """

    path: str
    module: nn.Module
    rate: float
    feeds: str | None
    attribute: str = "p"
    called: bool = True
    shared: tuple[str, ...] = ()
    through: str | None = None


@dataclass
class Inventory:
    """What was found in a model.

    Attributes
    ----------
    root, base : nn.Module
        The model freed of wrappers; in it what takes the tokens and holds all stacks.
    family : Family or None
        None for a model without a config.
    layers : int or None
        Number of blocks of the longest stack.
    places, own : list
        Sites; dropout of the model's own.
    phantoms : list of (name, rate, why)
        Rates that are set and never take effect.
    stacks : list of Stack
        Encoder and decoder told apart.
    undecided : list of (path, why)
        What could not be decided, for the audit.
    random : list of (path, what)
        Chance in the model that is outside every plan.
    """

    root: nn.Module
    base: nn.Module
    family: Family | None
    layers: int | None
    places: list[Place] = field(default_factory=list)
    own: list[OwnDropout] = field(default_factory=list)
    phantoms: list[tuple[str, float, str]] = field(default_factory=list)
    stacks: list[Stack] = field(default_factory=list)
    undecided: list[tuple[str, str]] = field(default_factory=list)
    random: list[tuple[str, str]] = field(default_factory=list)
    #: nn.Dropout (by id) that is never called: why, or None where its number is read all the same.
    silent: dict[int, str | None] = field(default_factory=dict)
    _counts: dict[str, int] = field(default_factory=dict)

    def add(
        self,
        kind: str,
        path: str,
        module: nn.Module,
        tensor: str,
        *,
        layer: int | None = None,
        part: str | None = None,
        layout: str | None = None,
        stack: str | None = None,
        extra: dict[str, Any] | None = None,
    ) -> None:
        """Add a place; from the second of its kind at one path on, its name ends in ``#2``, ``#3`` ..."""
        name = f"{path}#{kind}"
        number = self._counts.get(name, 0) + 1
        self._counts[name] = number
        name = name if number == 1 else f"{name}#{number}"
        self.places.append(
            Place(
                name, kind, path, part, layer, module, tensor, layout, stack, {} if extra is None else extra
            )
        )

    def has(self, name: str) -> bool:
        """Whether a site of that name was added."""
        return name in self._counts

    @property
    def kinds(self) -> list[str]:
        """Kinds that have a site here, in the order of the plan."""
        return sorted({place.kind for place in self.places}, key=ORDER.index)
