"""What a sampler claims: the distribution that logits and settings define, in float64, from the definitions
alone.

One sort, no kernels of this library: what judges must not share code with what is judged. Where a sampler's
own documentation says another rule than ours, `Rules` says it, and it is held to that.

Letters: V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from twodice.errors import ConfigError, nearest

Ties = Literal["lower-id", "kept"]
Crossing = Literal["kept", "dropped"]
Temperature = Literal["first", "last"]


class Rules(NamedTuple):
    """The rules that differ between engines; the defaults are twodice's own.

    ties: of tokens equal at the cut of top-k, those of lower id stay, or all. crossing: whether the token
    whose mass crosses top_p stays. temperature: before the filters, or only in the draw.
    """

    ties: Ties = "lower-id"
    crossing: Crossing = "kept"
    temperature: Temperature = "first"

    @classmethod
    def parse(cls, **given: str) -> Rules:
        """Check the words; an unknown one is an error that lists what there is."""
        for name, value in given.items():
            options = get_args(globals()[name.capitalize()])
            if value not in options:
                raise ConfigError(
                    f"{name} must be one of {', '.join(options)}; got {value!r}{nearest(value, options)}"
                )
        return cls(**given)  # type: ignore[arg-type]


OURS = Rules()


class Claim(NamedTuple):
    """The kept tokens in falling order of probability (equal ones by id), and their probabilities."""

    ids: npt.NDArray[np.int64]
    probabilities: npt.NDArray[np.float64]


def _softmax(z: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    e = np.exp(z - z[0])  # z falls, so z[0] is the largest
    found: npt.NDArray[np.float64] = e / math.fsum(e)
    return found


def claimed(logits: npt.NDArray[np.float32], settings: Mapping[str, Any], rules: Rules = OURS) -> Claim:
    """The distribution over the kept set.

    Parameters
    ----------
    logits : (V,) floats
        Finite or -inf, at least one finite.
    settings : mapping
        ``temperature`` in [0, inf); ``top_k``, ``top_p``, ``min_p``: None is off.
    """
    x = logits.astype(np.float64)
    order = np.lexsort((np.arange(len(x)), -x))
    order = order[np.isfinite(x[order])]
    z = x[order]
    temperature = settings["temperature"]
    if temperature == 0:
        return Claim(order[:1], np.ones(1))
    late = temperature if rules.temperature == "last" else 1.0
    z = z if rules.temperature == "last" else (z - z[0]) / temperature
    k = settings["top_k"]
    if k is not None and k < len(z):
        k = int((z >= z[k - 1]).sum()) if rules.ties == "kept" else k
        z = z[:k]
    top_p = settings["top_p"]
    if top_p is not None and top_p < 1:
        mass = _softmax(z).cumsum()
        crossing = int(np.searchsorted(mass, top_p))  # the first whose prefix reaches p
        z = z[: max(1, crossing + (rules.crossing == "kept"))]
    min_p = settings["min_p"]
    if min_p is not None and min_p > 0:
        z = z[z - z[0] >= math.log(min_p)]
    return Claim(order[: len(z)], _softmax(z / late))
