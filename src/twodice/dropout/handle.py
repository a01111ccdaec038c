"""The handle of an attached model: enter steps, draw by Monte Carlo, look at it, take it out.

Made by `attach`; what then runs inside is in `hooks`. Knows no kernel.

Letters: B rows, T positions.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from math import isfinite
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from twodice.dropout.audit import Audit, SiteRecord
from twodice.dropout.monte_carlo import MonteCarlo, monte_carlo
from twodice.dropout.plan import STACKS, DropoutPlan
from twodice.dropout.schedules import Constant
from twodice.dropout.site import Site
from twodice.dropout.sites import Inventory, OwnDropout, Place
from twodice.dropout.state import State
from twodice.dropout.step import FORMULA, Snapshot, coordinate
from twodice.errors import ConfigError, ContractError

#: What is attached now.
STATES: weakref.WeakSet[State] = weakref.WeakSet()


class Handle:
    """An attached model's dropout: enter steps, look at it, take it out. Made by `attach`.

    Attributes
    ----------
    plan : DropoutPlan
        The plan in force.
    seed : int
        The seed of the masks.
    """

    def __init__(
        self,
        model: nn.Module,
        state: State,
        inventory: Inventory,
        removable: list[RemovableHandle],
        places: list[Place],
    ) -> None:
        self._state = state
        self._inventory: Inventory | None = inventory
        self._removable = removable
        self._places = places
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
        examples : int64 tensor, array or list (B,) or (B, T), or callable, optional
            Slot of each row in the *global* batch of the step, in [0, 2^32); a callable is given the number
            of rows of each forward and returns them. (B, T), one slot a token, where a row holds several
            sequences. Default 0 .. B-1, which is legal for one forward and one rank only; else ``(micro *
            world + rank) * rows + arange(rows)``.
        positions : int64 tensor, array or list (B, T) or (1, T), or dict, optional
            Position of each token, in [0, 2^32). Default: ``position_ids`` of the forward, else 0 .. T-1
            (behind a cache: after what it holds). For an encoder-decoder a dict with ``encoder``, ``decoder``
            or both.
        draw : int
            Another draw of masks in the same step, in [0, 2^32); 0 is neutral.

        Raises
        ------
        ContractError
            Inside another step of this model, after `detach`, or without examples on several ranks. From a
            forward inside: a second one without examples, a packed row without a slot for each token,
            ``inputs_embeds`` under a plan with ``word``.
        ConfigError
            A number outside its range, or coordinates that are no integers.
        ShapeError
            From a forward inside: examples or positions that are not those of its rows.

        Notes
        -----
        Both the forward and the backward pass may run inside; the backward pass may also run after it, the
        recomputation of activation checkpointing included. Several forwards before one backward are right.

        *Randomness.* A unit is dropped by ``Key(seed).child("dropout", site, draw, visit)`` at the
        coordinates (step, example, position, column); `visit` counts how often this forward has come to the
        site. Masks in one step are the same for any split into micro-batches.

        Examples
        --------
        >>> import torch, twodice
        >>> model = torch.nn.Sequential(torch.nn.Dropout(0.1)).train()
        >>> handle = twodice.attach(model, "dropout=0.5", seed=7)
        >>> with handle.step(17, examples=[4, 5]):
        ...     both = model(torch.ones(2, 1, 8))
        >>> with handle.step(17, examples=[5]):
        ...     one = model(torch.ones(1, 1, 8))
        >>> torch.equal(both[1:], one)
        True
        >>> handle.detach()
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

    def monte_carlo(
        self, model: nn.Module, batch: Any, draws: int, *, per_pass: int = 1, logits: Any = None
    ) -> MonteCarlo:
        """Return what the model believes under `draws` fixed sets of masks: Monte Carlo dropout.

        Parameters
        ----------
        model : nn.Module
            The attached model, or a module that holds it. Its modes are put back afterwards.
        batch : mapping or tensor
            Its inputs. Tensors whose first axis is B are repeated where several draws run in one pass.
        draws : int
            K, 1 or more. About 50 give the accuracy of weight scaling (Srivastava et al. 2014, section 7.5).
        per_pass : int
            So many draws run in one pass of the model, as K * B rows. It changes speed and memory only, up to
            the order of summation.
        logits : callable, optional
            From the model's result to logits (B, ..., V); default its ``logits``, or the result itself.

        Returns
        -------
        MonteCarlo
            The mean distribution (B, ..., V), and for each token its predictive entropy and the mutual
            information [nats]: what the draws disagree about.

        Raises
        ------
        ContractError
            Inside a step, or after `detach`.
        ConfigError
            If several draws should share a pass although the plan drops weights or whole layers, which all
            rows of a pass share; if no number fits; if the model is another one, or the plan drops nothing.
        ShapeError
            If the batch has no rows, or the result no logits.

        Notes
        -----
        Everything but the plan's sites is in eval mode. The rates are the highest of the plan's schedules, as
        a trained model has no step.

        *Randomness.* The key of a site is ``Key(seed).child("monte-carlo", site, visit)``; the counter holds
        the number of the draw where a training step stands, and example 0 for every row: draw k is one
        network, the same for every input, for any batch and for any `per_pass`.

        Gal and Ghahramani 2016, "Dropout as a Bayesian approximation" (arXiv 1506.02142), equations 6 and 7.
        Weight scaling, the default everywhere else, is the model in eval mode.

        Examples
        --------
        >>> import torch, twodice
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.1), torch.nn.Linear(8, 3))
        >>> handle = twodice.attach(model, "dropout=0.3", seed=0)
        >>> found = handle.monte_carlo(model, torch.ones(2, 4), draws=50, per_pass=10)
        >>> tuple(found.mean.shape), tuple(found.mutual_information.shape)
        ((2, 3), (2,))
        >>> handle.detach()
        """
        return monte_carlo(self._state, model, batch, draws, per_pass=per_pass, logits=logits)

    def observe(self, step: int, loss: float) -> None:
        """Tell a validation loss, for schedules that follow it (`plateau`); others take no notice.

        Parameters
        ----------
        step : int
            The step before which it was measured; it counts from this step on. Never below the last one. The
            same measurement again is ignored, so that a resumed run may tell all that it has logged.
        loss : float
            Finite; lower is better.

        Raises
        ------
        ConfigError
            A step that lies before the last one, another loss for a step that has one, or a loss that is not
            finite.
        """
        known = self._state.losses
        if isinstance(step, bool) or not hasattr(step, "__index__") or step.__index__() < 0:
            raise ConfigError(f"step must be an integer of 0 or more; got {step!r}")
        step, loss = step.__index__(), float(loss)
        if not isfinite(loss):
            raise ConfigError(f"a validation loss must be finite; got {loss!r} at step {step}")
        if (step, loss) in known:
            return
        if known and step <= known[-1][0]:
            raise ConfigError(
                f"validation losses must come by rising step, one for each; got {loss!r} at step {step} "
                f"after {known[-1][1]!r} at step {known[-1][0]}"
            )
        known.append((step, loss))

    def recompute(self) -> tuple[Any, Any]:
        """Return the two contexts that ``torch.utils.checkpoint.checkpoint(...,
        context_fn=handle.recompute)`` asks for.

        Only for checkpoints of your own, with ``use_reentrant=False``; those of transformers and of torch's
        wrapper are seen without it.

        Returns
        -------
        tuple
            A context for the forward, which does nothing, and one for the recomputation, which re-enters the
            step, the positions and the visits of the forward.

        Raises
        ------
        ContractError
            Inside a step, but outside a forward of the attached model.
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
        """Return every site of the plan, every dropout of the model's own, every rate that nothing reads,
        chance outside the plan, and what could not be decided.

        Returns
        -------
        Audit
            ``str()`` of it is a table that says for each whether it is live and why; `Audit.to_json` the same
            for programs, `Audit.live` what drops in a training step.

        Raises
        ------
        ContractError
            After `detach`.
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
        records += [
            SiteRecord(path, "random", "chance", 0.0, "", True, f"{what}; outside every plan")
            for path, what in found.random
        ]
        records += [
            SiteRecord(path, "undecided", "none", 0.0, "", False, why) for path, why in found.undecided
        ]
        return Audit(state.model_name, str(state.plan), state.seed, tuple(records))

    def detach(self) -> None:
        """Take everything out: the model is exactly what it was. A second call does nothing.

        A backward pass that computes parts of a forward again must have run before.

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
        STATES.discard(state)
        self._removable, self._inventory, self._model = [], None, None
        state.sites, state.all_sites, state.switches, state.layers, state.preparations = [], [], [], [], []
        forget_compiled()


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
                f"masks; enter it with examples={FORMULA}"
            )
    return state.snapshot_of(
        step,
        draw,
        lambda schedule: schedule.rate(step, state.total_steps, state.losses),
        examples if callable(examples) else coordinate(examples, "examples", (1, 2)),
        _positions(positions),
    )


def _positions(given: Any) -> dict[str | None, torch.Tensor]:
    if not isinstance(given, dict):
        given = {None: given}
    found = {}
    for stack, values in given.items():
        if stack not in (None, *STACKS):
            raise ConfigError(f"positions are given for {' and '.join(STACKS)}; got {stack!r}")
        tensor = coordinate(values, "positions", (2,))
        if tensor is not None:
            found[stack] = tensor
    return found


def forget_compiled() -> None:
    """Compiled code holds the hooks that it was traced with (Dynamo does not look again): make it forget."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()


def _record(site: Site, place: Place) -> SiteRecord:
    schedule = site.schedule
    live, why = True, "in every step" if isinstance(schedule, Constant) else "on its schedule"
    if schedule.peak == 0:
        live, why = False, "the rate is 0"
    elif not place.module.training:
        live, why = False, "the module is in eval mode"
    return SiteRecord(
        site.name, "plan", site.entry.target, schedule.peak, str(schedule), live, why, place.layer
    )


def _own_record(own: OwnDropout, state: State) -> SiteRecord:
    rate = float(getattr(own.module if own.through is None else own.module.config, own.attribute))
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
