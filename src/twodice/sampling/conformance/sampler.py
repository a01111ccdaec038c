"""What a sampler is to the kit: a function from logits and the settings of each row to one token id a row.

The file finds that function, calls it, and checks what came back. It knows no statistics.

Letters: R rows, V vocabulary.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from twodice.errors import ConfigError, ShapeError, nearest

OFFERS = ("seeds", "coupled")
"""seeds: a token is a function of its row's logits, settings, seed and position. coupled: its noise belongs
to the token id, so that a change to the logits of one token moves the draw to that token, away from it, or
not at all."""
NEUTRAL: Mapping[str, Any] = {"temperature": 1.0, "top_k": None, "top_p": None, "min_p": None}


class Rows(Sequence[Mapping[str, Any]]):
    """The settings of R rows: a sequence of mappings, with what is alike in them kept once.

    ``rows[i]`` is ``{"temperature": 1.0, "top_k": None, "top_p": 0.9, "min_p": None, "seed": 7, "position":
    3}``. A sampler that is fast reads the columns instead: `kinds` (the unlike settings) and `which` of
    them a row has, `seeds` (None where the sampler does not offer seeds) and `positions`.
    """

    def __init__(
        self,
        kinds: Iterable[Mapping[str, Any]],
        positions: npt.NDArray[np.int64],
        seeds: npt.NDArray[np.int64] | None,
        which: npt.NDArray[np.int64] | None = None,
    ) -> None:
        self.kinds = tuple({**NEUTRAL, **kind} for kind in kinds)
        self.positions, self.seeds = positions, seeds
        self.which = np.zeros(len(positions), np.int64) if which is None else which

    def __len__(self) -> int:
        return len(self.positions)

    @overload
    def __getitem__(self, at: int) -> Mapping[str, Any]: ...
    @overload
    def __getitem__(self, at: slice) -> Rows: ...
    def __getitem__(self, at: int | slice) -> Mapping[str, Any] | Rows:
        if isinstance(at, slice):
            return self.take(np.arange(len(self))[at])
        return {
            **self.kinds[self.which[at]],
            "seed": None if self.seeds is None else int(self.seeds[at]),
            "position": int(self.positions[at]),
        }

    def take(self, at: npt.NDArray[np.int64]) -> Rows:
        """The rows with these numbers, in this order."""
        seeds = None if self.seeds is None else self.seeds[at]
        return Rows(self.kinds, self.positions[at], seeds, self.which[at])

    def groups(self) -> Iterator[tuple[Mapping[str, Any], npt.NDArray[np.int64]]]:
        """Each of `kinds` with the numbers of the rows that have it, for samplers with one setting a
        call.
        """
        for number, kind in enumerate(self.kinds):
            at = np.flatnonzero(self.which == number)
            if len(at):
                yield kind, at


Function = Callable[[Tensor, Rows], Any]


class NotOffered(Exception):
    """The sampler raised NotImplementedError: it does not claim what these settings ask for."""


class Sampler(NamedTuple):
    """A function that draws, its name, and what it offers beyond the distribution."""

    function: Function
    name: str
    offers: frozenset[str]

    def draw(self, logits: Tensor, rows: Rows, where: str) -> npt.NDArray[np.int64]:
        """Token ids (R,) for logits (R, V), checked for kind and shape; `where` is named in errors."""
        try:
            found = self.function(logits, rows)
        except NotImplementedError as error:
            raise NotOffered(str(error) or "the sampler raised NotImplementedError") from None
        except (Exception, SystemExit) as error:  # whose exit code would stand for a verdict
            raise ConfigError(
                f"the sampler must draw from every row that it is given; {self.name} raised "
                f"{type(error).__name__} at {where!r}: {' '.join(str(error).split())[:300]} "
                "(NotImplementedError says that settings are not offered)"
            ) from error
        try:
            tokens = torch.as_tensor(found)
        except Exception:
            raise ShapeError(
                f"{self.name} must return token ids as a tensor, array or list; got {type(found).__name__}"
            ) from None
        if tuple(tokens.shape) != (len(rows),) or tokens.is_floating_point() or tokens.dtype == torch.bool:
            raise ShapeError(
                f"{self.name} must return one integer a row, shape ({len(rows)},), for logits "
                f"{tuple(logits.shape)}; got shape {tuple(tokens.shape)} of "
                f"{str(tokens.dtype).removeprefix('torch.')} at {where!r}"
            )
        return tokens.detach().cpu().to(torch.int64).numpy()


def _offers(function: Function, given: Sequence[str] | None) -> frozenset[str]:
    names = getattr(function, "offers", ("seeds",)) if given is None else given
    names = (names,) if isinstance(names, str) else names
    for name in names:
        if name not in OFFERS:
            raise ConfigError(
                f"a sampler may offer {' and '.join(OFFERS)}; got {name!r}{nearest(name, OFFERS)}"
            )
    if "coupled" in names and "seeds" not in names:
        raise ConfigError("a sampler that offers coupled must offer seeds; got coupled alone")
    return frozenset(names)


def as_sampler(function: Function, name: str | None = None, offers: Sequence[str] | None = None) -> Sampler:
    """Wrap `function`; what it offers is `offers`, else its attribute of that name, else ``("seeds",)``."""
    name = getattr(function, "__name__", type(function).__name__) if name is None else name
    if not callable(function):
        raise ConfigError(f"a sampler must be a function; {name} is {type(function).__name__}")
    try:
        signature = inspect.signature(function)
    except ValueError:  # a builtin that does not tell
        return Sampler(function, name, _offers(function, offers))
    try:
        signature.bind(None, None)
    except TypeError:
        raise ConfigError(
            f"a sampler must take (logits, rows); {name} is defined as {name.rpartition(':')[2]}{signature}"
        ) from None
    return Sampler(function, name, _offers(function, offers))


def _functions(owner: Any) -> list[str]:
    """The public functions of a module or a class; looking at them loads nothing more."""
    public = [name for name in dir(owner) if not name.startswith("_")]
    found = {name: inspect.getattr_static(owner, name, None) for name in public}
    return [name for name, one in found.items() if callable(one) and not inspect.isclass(one)]


def load(text: str, offers: Sequence[str] | None = None) -> Sampler:
    """The sampler that ``module:function`` names; ``twodice`` and ``transformers`` name the adapters here.

    The module is looked for as ``python -m`` would: in the folder of the call first.
    """
    from twodice.sampling.conformance import adapters

    if text in adapters.BUILT_IN:
        return as_sampler(adapters.BUILT_IN[text], text, offers)
    module, colon, path = text.partition(":")
    if not colon or not module or not path:
        raise ConfigError(
            f"--sampler must be module:function, or one of {', '.join(adapters.BUILT_IN)}; got {text!r}"
            f"{nearest(text, adapters.BUILT_IN)}"
        )
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        value: Any = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"--sampler must name a module that can be imported; {module!r} gave "
            f"{type(error).__name__}: {error}"
        ) from error
    for name in path.split("."):
        if not hasattr(value, name):
            raise ConfigError(
                f"--sampler must name a function of {module}; there is no {name!r}"
                f"{nearest(name, _functions(value), cutoff=0.75)}"
            )
        value = getattr(value, name)
    return as_sampler(value, text, offers)
