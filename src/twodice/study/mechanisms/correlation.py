"""How far the units of a feed-forward move together: co-adaptation, as correlation shows it.

Knows no text. Letters: N observations (tokens), C units.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import nn

from twodice.dropout.places import Inventory
from twodice.random.keys import Key
from twodice.random.permutation import permute


def correlation(values_NC: torch.Tensor) -> float | None:
    """Mean absolute correlation of two different units over the observations, in [0, 1].

    Units that never change have no correlation and are left out.

    Returns
    -------
    float or None
        None with fewer than two units that change.

    Notes
    -----
    Cogswell et al. 2016, "Reducing overfitting in deep networks by decorrelating representations" (arXiv
    1511.06068), penalise the covariance of units; correlation is not moved by their scale. That dropout
    prevents units from adapting to one another is said by Hinton et al. 2012 (arXiv 1207.0580). N
    independent observations of unrelated units still give about ``sqrt(2 / (pi N))``.
    """
    values = values_NC.double()
    centred = values - values.mean(0)
    size = centred.norm(dim=0)
    # Rounding leaves a constant unit a spread of about 1e-16 of itself.
    moves = size > 1e-9 * values.norm(dim=0).clamp(min=1e-300)
    unit = centred[:, moves] / size[moves]
    count = unit.shape[1]
    if count < 2:
        return None
    together = (unit.T @ unit).abs().clamp(max=1)
    return float((together.sum() - together.diagonal().sum()) / (count * (count - 1)))


def read_units(found: Inventory, run: Callable[[], Any], most_units: int, key: Key) -> float | None:
    """`correlation` of the units of each feed-forward, as its last linear reads them; mean over the layers.

    Parameters
    ----------
    found
        The sites of a model in eval mode.
    run
        Runs it once.
    most_units
        So many of a layer's units are looked at; all where there are fewer.

    *Randomness.* The units of a layer are those that a keyed bijection sends to the first places.
    """
    means: list[float] = []

    def look(_: nn.Module, args: tuple[Any, ...]) -> None:
        values = args[0].detach().flatten(0, -2)
        count = values.shape[1]
        if count > most_units:
            columns = np.sort(permute(key, np.arange(most_units), count))
            values = values[:, torch.from_numpy(columns).to(values.device)]
        mean = correlation(values)
        if mean is not None:
            means.append(mean)

    places = [p for p in found.places if p.kind == "activation" and p.tensor == "input"]
    with ExitStack() as stack:
        for place in places:
            stack.callback(place.module.register_forward_pre_hook(look).remove)
        run()
    return sum(means) / len(means) if means else None
