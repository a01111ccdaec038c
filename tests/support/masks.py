"""The masks that an attached model really uses, seen where they are thrown."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from twodice.dropout import attention, site
from twodice.kernels.noise import kept


@contextmanager
def masks_seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Collect, by site, the mask of every call: True where a unit, a weight or a key stays.

    For Gaussian noise the factors are collected instead.
    """
    seen: dict[str, list[torch.Tensor]] = {}
    names: list[str] = []
    true_dropout, true_noisy, true_attention = site.dropout, site.noisy, attention.attention
    enter = site.Site.enter

    def entered(self: site.Site, frame: Any, **how: Any) -> Any:
        names.append(self.name)
        return enter(self, frame, **how)

    def spied(true: Any) -> Any:
        def spy(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            factors = true(torch.ones_like(x), *args, **kwargs).detach()
            noise = kwargs.get("noise")
            mask = factors if noise is not None and noise.form == "gaussian" else factors > 0
            seen.setdefault(names.pop(), []).append(mask)
            return true(x, *args, **kwargs)

        return spy

    def attending(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, threshold: Any, site_key: Any, step: Any,
        **rest: Any,
    ) -> torch.Tensor:  # fmt: skip
        shape = (*query.shape[:3], key.shape[2])
        where = {name: rest[name] for name in ("examples", "positions", "key_positions")}
        here = [names.pop() for _ in range(len(names))]
        for name in here:
            keys = name.endswith("#key")
            rate, bits = (rest["drop_keys"], rest["keys_key"]) if keys else (threshold, site_key)
            seen.setdefault(name, []).append(kept(rate, bits, step, shape, layout="bhts", **where))
        return true_attention(query, key, value, threshold, site_key, step, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(site.Site, "enter", entered)
        patch.setattr(site, "dropout", spied(true_dropout))
        patch.setattr(site, "noisy", spied(true_noisy))
        patch.setattr(attention, "attention", attending)
        yield seen
