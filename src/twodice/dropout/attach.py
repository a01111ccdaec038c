"""Dropout put into a model from outside, and taken out again without a trace.

The main path: `attach` finds the sites that the plan speaks of and hooks them; `Handle.step` enters a step;
`Handle.audit` says what is live; `Handle.detach` takes everything out. What then runs inside is in `hooks`.

Letters: B rows, T positions.
"""

from __future__ import annotations

import inspect
import itertools
import sys
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from twodice.dropout import attention
from twodice.dropout.audit import Audit, SiteRecord
from twodice.dropout.hooks import (
    BaseHook,
    GuardHook,
    Hook,
    Inert,
    InputHook,
    OutputHook,
    Reader,
    RootEnd,
    RootHook,
    Site,
    State,
)  # fmt: skip
from twodice.dropout.plan import DropoutPlan, Entry
from twodice.dropout.schedules import threshold
from twodice.dropout.sites import Inventory, OwnDropout, Place, find, has_fast_path, unwrap, walk
from twodice.dropout.step import FORMULA, Snapshot, coordinate, site_key
from twodice.errors import ConfigError, ContractError, nearest

_NUMBERS = itertools.count(1)
_STATES: weakref.WeakSet[State] = weakref.WeakSet()


class Handle:
    """An attached model's dropout: enter steps, look at it, take it out. Made by `attach`."""

    def __init__(
        self, model: nn.Module, state: State, inventory: Inventory, removable: list[RemovableHandle]
    ) -> None:
        self._state = state
        self._inventory: Inventory | None = inventory
        self._removable = removable
        self._model: nn.Module | None = model

    @property
    def plan(self) -> DropoutPlan:
        """The plan in force."""
        return self._state.plan

    @property
    def seed(self) -> int:
        """The seed of the masks."""
        return self._state.seed

    @contextmanager
    def step(self, step: int, examples: Any = None, positions: Any = None, draw: int = 0) -> Iterator[None]:
        """Enter a step of training: what its masks are a function of.

        Parameters
        ----------
        step : int
            Number of the step, counted from 0, in [0, 2^32).
        examples : int64 tensor, array or list (B,) or (B, T), optional
            Slot of each row in the *global* batch of the step. Default 0 .. B-1, which is legal for one
            forward and one rank only; else ``(micro * world + rank) * rows + arange(rows)``.
        positions : int64 tensor, array or list (B, T) or (1, T), optional
            Position of each token. Default: ``position_ids`` of the forward, else 0 .. T-1 (behind a cache:
            after what it holds).
        draw : int
            Another draw of masks in the same step; 0 or more.

        Raises
        ------
        ContractError
            Inside another step of this model, after `detach`, or without examples on several ranks.
        ConfigError
            A number outside its range, or a schedule whose run's length is not known.

        Notes
        -----
        *Randomness.* A unit is dropped by ``Key(seed).child("dropout", site, draw, visit)`` at the
        coordinates (step, example, position, column). Masks in one step are the same for any split into
        micro-batches.
        """
        state = self._state
        if not state.attached:
            raise ContractError("a step needs an attached model; this one was detached; call attach again")
        if state.snapshot is not None or state.saved:
            raise ContractError("a step must end before the next begins; another one is open")
        snapshot = _snapshot(state, step, examples, positions, draw)
        state.switch_on()
        state.snapshot = snapshot
        try:
            yield
        finally:
            state.snapshot = None
            state.frame = None
            state.switch_off()

    def recompute(self) -> tuple[Any, Any]:
        """Return the two contexts that ``torch.utils.checkpoint.checkpoint(...,
        context_fn=handle.recompute)`` asks for.

        Only for checkpoints of your own; those of transformers are seen without it.
        """
        state = self._state
        frame = state.frame
        if frame is None:
            if state.snapshot is None:
                return _nothing(), _nothing()
            raise ContractError(
                "a checkpoint must lie inside a forward of the attached model; got one outside"
            )
        return _nothing(), state.repeating(frame, tuple(frame.visits))

    def audit(self) -> Audit:
        """Return every site of the plan, every dropout of the model's own and every rate that nothing reads.

        ``str()`` of it is a table that says for each whether it is live and why.
        """
        state, found = self._state, self._inventory
        if found is None:
            raise ContractError("an audit needs an attached model; this one was detached; call attach again")
        records = [_record(site, place) for site, place in zip(state.all_sites, self._places, strict=True)]
        records += [_own_record(own, state) for own in found.own]
        records += [
            SiteRecord(name, "config", "rate", rate, repr(rate), False, why)
            for name, rate, why in found.phantoms
        ]
        return Audit(state.model_name, str(state.plan), state.seed, tuple(records))

    def detach(self) -> None:
        """Take everything out: the model is exactly what it was. A second call does nothing.

        Raises
        ------
        ContractError
            Inside a step.
        """
        state = self._state
        if not state.attached:
            return
        if state.snapshot is not None or state.saved:
            raise ContractError("detach must not be called inside a step; leave it first")
        for handle in self._removable:
            handle.remove()
        state.attached = False
        _STATES.discard(state)
        self._removable, self._inventory, self._model = [], None, None
        state.sites, state.all_sites, state.switches, state.layers, state.config = [], [], [], [], None
        _forget_compiled()

    _places: list[Place]


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _snapshot(state: State, step: int, examples: Any, positions: Any, draw: int) -> Snapshot:
    for name, number in (("step", step), ("draw", draw)):
        if (
            isinstance(number, bool)
            or not hasattr(number, "__index__")
            or not 0 <= number.__index__() < 2**32
        ):
            raise ConfigError(f"{name} must be an integer in [0, 2^32); got {number!r}")
    step, draw = step.__index__(), draw.__index__()
    if examples is None and torch.distributed.is_available() and torch.distributed.is_initialized():
        world = torch.distributed.get_world_size()
        if world > 1:
            raise ContractError(
                f"a step without examples is for one rank; there are {world}, which would all get the same "
                "masks; enter it "
                f"with examples={FORMULA}"
            )
    if draw not in state.keys:
        state.keys[draw] = tuple(site_key(state.seed, site.name, draw, 0) for site in state.sites)
    by_entry = {
        entry: threshold(entry.schedule.rate(step, state.total_steps)) for entry in state.plan.entries
    }
    thresholds = tuple(by_entry[site.entry] for site in state.sites)
    return Snapshot(
        step,
        draw,
        coordinate(examples, "examples", (1, 2)),
        coordinate(positions, "positions", (2,)),
        thresholds,
        torch.tensor(thresholds, dtype=torch.int64),
        torch.tensor(step),
    )


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
        A GPT-2, Llama, Mistral or Qwen2 of transformers (in any wrapper), or any module that holds
        ``nn.Dropout``.
    plan : DropoutPlan, text, mapping or path
        Which sites, which rate, on which schedule.
    seed : int
        Seed of the masks, in [-2^63, 2^64).
    total_steps : int, optional
        Length of the run, for schedules that speak of fractions of it.
    share : Handle or nn.Module, optional
        Another attached model with the same seed whose masks this one is meant to share.

    Returns
    -------
    Handle
        To enter steps, to audit, to detach.

    Raises
    ------
    ConfigError
        A kind, place or layer that this model does not have; two entries that reach one tensor; a missing
        `total_steps`; a seed outside its range.
    ContractError
        If the model, or a part of it, is attached already.

    Notes
    -----
    The model's own dropout is switched off, within a step, where the plan speaks, and left alone where it
    does not. ``eval()`` is bit-equal to the plain model.
    *Randomness.* See `Handle.step`; the site's name is ``<module path>#<kind>``.
    """
    plan = DropoutPlan.parse(plan)
    if total_steps is not None and (
        isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1
    ):
        raise ConfigError(f"total_steps must be an integer of 1 or more; got {total_steps!r}")
    for entry in plan.entries:
        if entry.schedule.needs_total and total_steps is None:
            raise ConfigError(f"{str(entry)!r} depends on the length of the run: pass total_steps to attach")
    found = find(model)
    _refuse_attached(found)
    chosen = _choose(found, plan)
    state = State(found, plan, seed, total_steps, f"twodice-{next(_NUMBERS)}")
    site_key(seed, "", 0, 0)  # a seed outside its range is refused here
    _warn_of_twins(state, share)
    _forget_compiled()
    handle = _install(model, state, found, chosen)
    _STATES.add(state)
    return handle


def _refuse_attached(found: Inventory) -> None:
    for path, module in walk(found.root):
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for hook in hooks.values():
                if isinstance(hook, Hook):
                    at = f" (at {path!r})" if path else ""
                    raise ContractError(f"a model is attached once; this one is already{at}; detach it first")


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


def _choose(found: Inventory, plan: DropoutPlan) -> list[tuple[Place, Entry]]:
    """The sites that the plan speaks of, each with its entry, in the order of the model."""
    chosen: dict[str, tuple[Place, Entry]] = {}
    model = type(found.root).__name__
    for entry in plan.entries:
        places = [place for place in found.places if place.kind == entry.kind]
        if not places:
            there = ", ".join(found.kinds) if found.kinds else "none"
            raise ConfigError(
                f"{entry.kind!r} has no site in {model}; the kinds there are: "
                f"{there}{nearest(entry.kind, found.kinds)}"
            )
        if entry.place is not None and entry.kind == "dropout":
            paths = [place.path for place in places]
            places = [p for p in places if p.path == entry.place or p.path.startswith(f"{entry.place}.")]
            if not places:
                raise ConfigError(
                    f"{entry.target!r} matches no nn.Dropout of {model}{nearest(entry.place, paths)}"
                )
        elif entry.place is not None:
            places = [place for place in places if place.part == entry.place]
        if entry.layers is not None:
            assert found.layers is not None
            for end in (entry.layers.start, entry.layers.stop):
                if end is not None and not -found.layers <= end <= found.layers:
                    raise ConfigError(f"layers of {model} are 0 to {found.layers - 1}; got {entry.target!r}")
            wanted = entry.layers.indices(found.layers)
            places = [place for place in places if place.layer in wanted]
            if not places:
                raise ConfigError(f"{entry.target!r} names no layer; {model} has {found.layers}")
        for place in places:
            if place.name in chosen:
                raise ConfigError(
                    f"each site must be spoken of once; {str(chosen[place.name][1])!r} and {str(entry)!r} "
                    "both reach "
                    f"{place.name!r}"
                )
            chosen[place.name] = place, entry
    for own in found.own:
        twice = f"{own.path}#dropout"
        if own.feeds in chosen and twice in chosen:
            raise ConfigError(
                f"{str(chosen[own.feeds][1])!r} and {str(chosen[twice][1])!r} reach the same tensor at "
                f"{own.path!r}; leave "
                "one out, or narrow 'dropout' by its path"
            )
    return [chosen[place.name] for place in found.places if place.name in chosen]


def _warn_of_twins(state: State, share: Handle | nn.Module | None) -> None:
    shared = share._state if isinstance(share, Handle) else None
    if isinstance(share, nn.Module):
        root = unwrap(share)
        shared = next((s for s in _STATES if s.attached and s.root() is root), None)
        if shared is None:
            raise ConfigError(
                f"share must be an attached model or its handle; this {type(share).__name__} is not attached"
            )
    if shared is not None:
        if shared.seed != state.seed:
            raise ConfigError(f"models that share masks need one seed; got {state.seed} and {shared.seed}")
        return
    if any(other.attached and other.seed == state.seed and other.root() is not None for other in _STATES):
        warnings.warn(
            f"another model is attached with seed {state.seed}: sites of equal name get equal masks; pass "
            "share=other if "
            "that is meant, else another seed",
            UserWarning,
            stacklevel=3,
        )


def _forget_compiled() -> None:
    """Compiled code holds the hooks that it was traced with (Dynamo does not look again): make it forget."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()


def _install(model: nn.Module, state: State, found: Inventory, chosen: list[tuple[Place, Entry]]) -> Handle:
    """Put the hooks in. What must not stand there outside a step goes into the state's switches instead."""
    root, base, family = found.root, found.base, found.family
    _drop_inert(root)
    removable: list[RemovableHandle] = []
    fleeting = has_fast_path(root)
    generates = hasattr(root, "generate")
    reader = None if family is None else Reader(list(inspect.signature(base.forward).parameters))
    at_root = reader if base is root else None
    removable.append(
        root.register_forward_pre_hook(RootHook(state, at_root, generates, family is None), with_kwargs=True)
    )
    removable.append(root.register_forward_hook(RootEnd(state), always_call=True))
    if reader is not None and base is not root:
        removable.append(base.register_forward_pre_hook(BaseHook(state, reader), with_kwargs=True))
    everything = []
    for place, entry in chosen:
        live = entry.schedule.peak > 0
        site = Site(state, len(state.sites) if live else -1, place, entry)
        everything.append(site)
        if not live:
            continue
        state.sites.append(site)
        module = place.module
        if place.tensor == "attention":
            assert family is not None
            if state.config is None:
                state.config = base.config
                state.eager = sys.modules[family.home].eager_attention_forward
                attention.road_of(base.config, state.eager, state.model_name)
                from transformers.modeling_utils import AttentionInterface

                state.switches.append((AttentionInterface._global_mapping, state.name, attention.attend))
            removable.append(module.register_forward_pre_hook(GuardHook(state, place.name)))
            copied = attention.shadow(module.config, state.name, site)
            state.switches.append((module.__dict__, "config", copied))
        elif place.tensor == "input":
            before = InputHook(state, site)
            if fleeting:
                state.switches.append(
                    (module._forward_pre_hooks, RemovableHandle(module._forward_pre_hooks).id, before)
                )
            else:
                removable.append(module.register_forward_pre_hook(before))
        else:
            after = OutputHook(state, site)
            if fleeting:
                state.switches.append(
                    (module._forward_hooks, RemovableHandle(module._forward_hooks).id, after)
                )
            else:
                removable.append(module.register_forward_hook(after))
    spoken = {place.name for place, _ in chosen}
    for own in found.own:
        if own.feeds in spoken or f"{own.path}#dropout" in spoken:
            state.switches.append((own.module.__dict__, own.attribute, 0.0))
    for _, module in walk(root):
        if hasattr(module, "gradient_checkpointing") or hasattr(module, "checkpoint_fn"):
            state.layers.append(module.__dict__)
    for module in model.modules():
        if "checkpoint_fn" in module.__dict__ and module.__dict__ not in state.layers:
            state.layers.append(module.__dict__)
    state.all_sites = everything
    state.spoken = spoken
    handle = Handle(model, state, found, removable)
    handle._places = [place for place, _ in chosen]
    return handle


def _record(site: Site, place: Place) -> SiteRecord:
    schedule = site.entry.schedule
    live, why = True, "in every step" if str(schedule) == repr(schedule.peak) else "on its schedule"
    if schedule.peak == 0:
        live, why = False, "the rate is 0"
    elif not place.module.training:
        live, why = False, "the module is in eval mode"
    return SiteRecord(
        site.name, "plan", site.entry.target, schedule.peak, str(schedule), live, why, place.layer
    )


def _own_record(own: OwnDropout, state: State) -> SiteRecord:
    rate = float(getattr(own.module, own.attribute))
    kind = type(own.module).__name__
    if own.feeds in state.spoken:
        live, why = False, f"switched off within a step: the plan speaks of {own.feeds!r}"
    elif f"{own.path}#dropout" in state.spoken:
        live, why = False, f"replaced within a step by {own.path + '#dropout'!r}"
    elif rate == 0:
        live, why = False, "the rate is 0"
    elif not own.module.training:
        live, why = False, "the module is in eval mode"
    else:
        live, why = True, "the plan does not speak of it; drawn by torch's generator, not by a key"
    return SiteRecord(own.path, "model", kind, rate, repr(rate), live, why)
