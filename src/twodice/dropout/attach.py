"""Dropout put into a model from outside, and taken out again without a trace.

The main path: `attach` finds the sites that the plan speaks of (`choose`) and hooks them (`install`). What
one does with an attached model is in `handle`, what then runs inside is in `hooks`.
"""

from __future__ import annotations

import inspect
import itertools
import warnings
from typing import Any

from torch import nn

from twodice.dropout.choose import choose, refuse_halves
from twodice.dropout.handle import STATES, Handle, forget_compiled
from twodice.dropout.hooks import BaseHook, Hook, Inert, Reader, RootEnd, RootHook
from twodice.dropout.install import Hooked, make_site, switch_off
from twodice.dropout.plan import DropoutPlan, Entry
from twodice.dropout.schedules import Schedule
from twodice.dropout.sites import Inventory, Place, find, has_fast_path, unwrap, walk
from twodice.dropout.state import State
from twodice.dropout.step import site_key
from twodice.errors import ConfigError, ContractError

_NUMBERS = itertools.count(1)


def attach(
    model: nn.Module,
    plan: DropoutPlan | str | Any,
    seed: int = 0,
    *,
    total_steps: int | None = None,
    share: Handle | nn.Module | None = None,
) -> Handle:
    """Put the dropout of a plan into a model, from outside.

    Parameters
    ----------
    model : nn.Module
        A model of transformers (``docs/models.md`` lists those that are tested; others are matched by the
        structure of their blocks), in any wrapper but ``nn.DataParallel``, or any module. Its weights are not
        touched.
    plan : DropoutPlan, text, mapping or path
        Which sites, which noise, which rate, on which schedule; see `DropoutPlan.parse`.
    seed : int
        Seed of the masks, in [-2^63, 2^64).
    total_steps : int, optional
        Length of the run, 1 or more, for schedules that speak of fractions of it.
    share : Handle or nn.Module, optional
        Another attached model with the same seed whose masks this one is meant to share: sites of equal name
        have equal masks in equal steps.

    Returns
    -------
    Handle
        To enter steps, to audit, to detach.

    Raises
    ------
    ConfigError
        A kind, place or layer that this model does not have; two entries that reach one tensor; a plan that
        speaks of a part of what one rate of the model feeds; a missing `total_steps`; a seed outside its
        range; a `share` that is not attached or has another seed.
    ContractError
        If the model, or a part of it, is attached already.

    Warns
    -----
    UserWarning
        If another model is attached with this seed and `share` does not say that this is meant.

    Notes
    -----
    The model's own dropout is switched off, within a step, where the plan speaks, and left alone where it
    does not. ``eval()`` is bit-equal to the plain model. What each kind drops, and the paper that it is from,
    stands in ``docs/dropout.md`` and ``docs/contracts/dropout.md``. Code that was compiled is compiled again.

    *Randomness.* See `Handle.step`; the site's name is ``<module path>#<kind>``.

    Examples
    --------
    >>> import torch, twodice
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 3))
    >>> handle = twodice.attach(model, "dropout=linear(0.3, 0.0), weight.2=0.1", seed=7, total_steps=100)
    >>> print(handle.audit())
    Sequential, seed 7, plan: weight.2=0.1, dropout=linear(0.3, 0.0)
    site       source  schedule          live  why
    2#weight   plan    0.1               yes   in every step
    1#dropout  plan    linear(0.3, 0.0)  yes   on its schedule
    1          model   0.5               no    replaced within a step by '1#dropout'
    >>> handle.detach()
    """
    plan = DropoutPlan.parse(plan)
    if total_steps is not None and (
        isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1
    ):
        raise ConfigError(f"total_steps must be an integer of 1 or more; got {total_steps!r}")
    for entry in plan.entries:
        if entry.schedule.needs_total and total_steps is None:
            raise ConfigError(
                f"the length of the run must be known to {str(entry)!r}; got no total_steps; pass it to "
                "attach, or write whole steps in the plan"
            )
    found = find(model)
    _refuse_attached(found)
    chosen = choose(found, plan)
    refuse_halves(found.own, {place.name for place, _, _ in chosen})
    state = State(found, plan, seed, total_steps, f"twodice-{next(_NUMBERS)}")
    site_key(seed, "", 0, 0)  # a seed outside its range is refused here
    _warn_of_twins(state, share)
    forget_compiled()
    handle = _install(model, state, found, chosen)
    STATES.add(state)
    return handle


def _refuse_attached(found: Inventory) -> None:
    for path, module in walk(found.root):
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for hook in hooks.values():
                if isinstance(hook, Hook):
                    at = f" (at {path!r})" if path else ""
                    raise ContractError(
                        f"a model may be attached once; got one that is attached already{at}; call detach() "
                        "of the handle that it has, then attach again"
                    )


def _drop_inert(root: nn.Module) -> None:
    """Take out what a deep copy of an attached model brought along."""
    for _, module in walk(root):
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for number in [n for n, hook in hooks.items() if isinstance(hook, Inert)]:
                del hooks[number]
                for rest in (
                    module._forward_hooks_with_kwargs,
                    module._forward_hooks_always_called,
                    module._forward_pre_hooks_with_kwargs,
                ):
                    rest.pop(number, None)


def _warn_of_twins(state: State, share: Handle | nn.Module | None) -> None:
    if share is not None:
        root = unwrap(share) if isinstance(share, nn.Module) else None
        shared = share._state if isinstance(share, Handle) else None
        if root is not None:
            shared = next((s for s in STATES if s.root() is root), None)
        if shared is None or not shared.attached:
            raise ConfigError(
                f"share must be an attached model or its handle; this {type(share).__name__} is not attached"
            )
        if shared.seed != state.seed:
            raise ConfigError(f"models that share masks need one seed; got {state.seed} and {shared.seed}")
        return
    if any(other.attached and other.seed == state.seed and other.root() is not None for other in STATES):
        warnings.warn(
            f"another model is attached with seed {state.seed}: sites of equal name get equal masks; pass "
            "share=other if that is meant, else another seed",
            UserWarning,
            stacklevel=3,
        )


def _install(
    model: nn.Module, state: State, found: Inventory, chosen: list[tuple[Place, Entry, Schedule]]
) -> Handle:
    """Put the hooks in. What must not stand there outside a step goes into the state's switches instead."""
    root = found.root
    _drop_inert(root)
    hooked = Hooked(state, has_fast_path(root))
    generates = hasattr(root, "generate")
    at_root = []
    for stack in found.stacks:
        reader = Reader(list(inspect.signature(stack.base.forward).parameters), stack.name, stack.time_first)
        if stack.base is root:
            at_root.append(reader)
        elif hooked.fleeting:
            hooked.before(stack.base, BaseHook(state, reader), with_kwargs=True)
        else:
            before = stack.base.register_forward_pre_hook(BaseHook(state, reader), with_kwargs=True)
            hooked.removable.append(before)
    hooked.removable.append(
        root.register_forward_pre_hook(
            RootHook(state, at_root, generates, not found.stacks), with_kwargs=True
        )
    )
    end = RootEnd(state)
    hooked.removable.append(root.register_forward_hook(end, always_call=True))
    everything = []
    for place, entry, schedule in chosen:
        live = schedule.peak > 0
        site = make_site(state, len(state.sites) if live else -1, place, entry, schedule)
        everything.append(site)
        if live:
            state.sites.append(site)
            if place.tensor == "lookup":
                end.lookups.append((site, place.module))
            try:
                hooked.put(site, place)
            except BaseException:
                for removable in hooked.removable:
                    removable.remove()
                raise
    spoken = {place.name for place, _, _ in chosen}
    for own in found.own:
        if own.feeds in spoken or f"{own.path}#dropout" in spoken:
            switch_off(state, own.module, own.attribute, own.through)
    for _, module in walk(root):
        if hasattr(module, "gradient_checkpointing") or hasattr(module, "checkpoint_fn"):
            state.layers.append(module.__dict__)
    for module in model.modules():
        if "checkpoint_fn" in module.__dict__ and module.__dict__ not in state.layers:
            state.layers.append(module.__dict__)
    state.all_sites = everything
    state.spoken = spoken
    return Handle(model, state, found, hooked.removable, [place for place, _, _ in chosen])
