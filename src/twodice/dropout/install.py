"""Which hook acts on which tensor of a place: from a `Place` and its site to what stands in the model.

Knows nothing of plans and steps; `attach` walks over the chosen places and hands each to `Hooked.put`.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from twodice.dropout.adapters import AdapterForward, AdapterHook
from twodice.dropout.attention import Attending, attend
from twodice.dropout.experts import ExpertsForward
from twodice.dropout.fused import MultiheadForward, RecurrentForward, StandIn
from twodice.dropout.hooks import GuardHook, InputHook, OutputHook
from twodice.dropout.kinds import (
    ChannelSite,
    HeadSite,
    LayerForward,
    LookupHook,
    ProbabilitiesHook,
    SkipHook,
    StreamHook,
    TokenSite,
    WeightEnd,
    WeightHook,
)
from twodice.dropout.plan import Entry
from twodice.dropout.schedules import Schedule
from twodice.dropout.site import Site
from twodice.dropout.sites import Place
from twodice.dropout.state import State
from twodice.errors import ConfigError


def make_site(state: State, index: int, place: Place, entry: Entry, schedule: Schedule) -> Site:
    """Return the site of a place, of the class that its kind needs."""
    if place.kind == "head":
        head = HeadSite(state, index, place, entry, schedule)
        head.heads = place.extra["heads"]
        if place.tensor == "multihead":
            head.layout = "btc"  # the joined heads, whatever the axes of the module's input
        return head
    kind = ChannelSite if place.tensor == "channels" else TokenSite if place.kind == "token" else Site
    site = kind(state, index, place, entry, schedule)
    if entry.noise == "tied":
        # One mask for one parameter, whatever module reads it: that of the first of their paths.
        site.key_name = f"{min(place.path, *place.extra['tied'], place.path)}#weight"
    return site


def switch_off(state: State, module: nn.Module, attribute: str, through: str | None) -> None:
    """Make an own rate 0 while a step runs, in the module or in a copy of the config that it reads."""
    if through is None:
        state.switches.append((module.__dict__, attribute, 0.0))
        return
    copied = copy.copy(module.config)
    copied.__dict__[attribute] = 0.0
    state.switches.append((module.__dict__, through, copied))


class Hooked:
    """What was put into one model.

    Attributes
    ----------
    removable : list of RemovableHandle
        Hooks that stand until `detach`.
    fleeting : bool
        Whether hooks may stand only while a step runs, because their presence alone would switch off a fast
        path of eval.
    """

    def __init__(self, state: State, fleeting: bool) -> None:
        self.state = state
        self.fleeting = fleeting
        self.removable: list[RemovableHandle] = []
        self._attending: dict[int, Attending] = {}
        self._stand_ins: dict[int, StandIn] = {}

    def put(self, site: Site, place: Place) -> None:
        """Put in what the site needs."""
        state, module = self.state, place.module
        if place.tensor == "attention":
            self._attention(site, place)
        elif place.tensor == "input":
            self.before(module, InputHook(state, site))
        elif "reader" in place.extra:
            hook, matrix = AdapterHook(state, site), place.extra["reader"]
            self.after(module, hook)
            state.switches.append((matrix.__dict__, "forward", AdapterForward(hook, matrix, matrix.forward)))
        elif place.tensor in ("output", "channels"):
            self.after(module, OutputHook(state, site))
        elif place.tensor == "lookup":
            self.after(module, LookupHook(state, site))
        elif place.tensor == "weight" and not isinstance(module, nn.RNNBase):
            path, _, name = place.extra["parameter"].rpartition(".")
            holder = module.get_submodule(path)
            self.before(module, WeightHook(state, site, holder, name, _is_turned(module)))
            self.after(module, WeightEnd(state, holder, name), always=True)
        elif place.tensor == "probabilities":
            self.after(module, ProbabilitiesHook(state, site))
        elif place.tensor == "multihead":
            self._stand_in(module, MultiheadForward).sites[place.kind] = site
        elif place.tensor == "recurrent":
            self._stand_in(module, RecurrentForward).sites["between"] = site
        elif place.tensor == "weight":
            self._stand_in(module, RecurrentForward).sites[place.extra["parameter"]] = site
        elif place.tensor == "experts":
            state.switches.append(
                (module.__dict__, "forward", ExpertsForward(state, site, module, module.forward))
            )
        elif place.tensor == "skip":
            self.before(place.extra["stream"], StreamHook(state, site), with_kwargs=True)
            self.after(module, SkipHook(state, site))
            for holder, attribute, through in place.extra["between"]:
                switch_off(state, holder, attribute, through)
        elif place.tensor == "block":
            forward = LayerForward(state, site, module, site.entry.noise == "batch", module.forward)
            state.switches.append((module.__dict__, "forward", forward))
        else:
            raise ConfigError(
                f"{place.kind!r} is not served at {place.path!r} yet ({place.tensor}); leave it out of the "
                "plan, or narrow the entry"
            )

    def _stand_in(self, module: Any, kind: type[StandIn]) -> StandIn:
        """The one stand-in for a module's forward that all its sites share."""
        found = self._stand_ins.get(id(module))
        if found is None:
            found = self._stand_ins[id(module)] = kind(self.state, module, module.forward)
            self.state.switches.append((module.__dict__, "forward", found))
        return found

    def _attention(self, site: Site, place: Place) -> None:
        state, module = self.state, place.module
        attending = self._attending.get(id(module))
        if attending is None:
            attending = self._attending[id(module)] = Attending(state, module)
            if len(self._attending) == 1:
                from transformers.modeling_utils import AttentionInterface

                state.switches.append((AttentionInterface._global_mapping, state.name, attend))
            self.removable.append(module.register_forward_pre_hook(GuardHook(state, place.name)))
            state.switches.append((module.__dict__, "config", attending.shadow(state.name)))
            state.preparations.append(attending.find_road)
        attending.cross = place.part == "cross"
        if place.kind == "key":
            attending.keys = site
        else:
            attending.weights = site
        attending.find_road()

    def before(self, module: nn.Module, hook: Any, with_kwargs: bool = False) -> None:
        """Put a hook before a module's forward."""
        if self.fleeting:
            hooks: Any = module._forward_pre_hooks
            number = RemovableHandle(hooks).id
            self.state.switches.append((hooks, number, hook))
            if with_kwargs:
                self.state.switches.append((module._forward_pre_hooks_with_kwargs, number, True))
        else:
            self.removable.append(module.register_forward_pre_hook(hook, with_kwargs=with_kwargs))

    def after(self, module: nn.Module, hook: Any, always: bool = False) -> None:
        """Put a hook behind a module's forward."""
        if self.fleeting:
            hooks: Any = module._forward_hooks
            number = RemovableHandle(hooks).id
            self.state.switches.append((hooks, number, hook))
            if always:
                self.state.switches.append((module._forward_hooks_always_called, number, True))
        else:
            self.removable.append(module.register_forward_hook(hook, always_call=always))


def _is_turned(module: nn.Module) -> bool:
    """Whether a weight lies as (input units, output units): the Conv1D of transformers."""
    return type(module).__name__ == "Conv1D"
