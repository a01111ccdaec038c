"""Which hook acts on which tensor of a place: from a `Place` and its site to what stands in the model.

Knows nothing of plans and steps; `attach` walks over the chosen places and hands each to `Hooked.put`.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from twodice.dropout.attention import Attending, attend
from twodice.dropout.hooks import GuardHook, InputHook, OutputHook, Site, State
from twodice.dropout.kinds import (
    HeadSite,
    LayerForward,
    LookupHook,
    SkipHook,
    StreamHook,
    TokenSite,
    WeightEnd,
    WeightHook,
)
from twodice.dropout.plan import Entry
from twodice.dropout.schedules import Schedule
from twodice.dropout.sites import Place
from twodice.errors import ConfigError


def make_site(state: State, index: int, place: Place, entry: Entry, schedule: Schedule) -> Site:
    """Return the site of a place, of the class that its kind needs."""
    if place.kind == "head":
        site = HeadSite(state, index, place, entry, schedule)
        site.heads = place.extra["heads"]
        return site
    return (TokenSite if place.kind == "token" else Site)(state, index, place, entry, schedule)


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

    def put(self, site: Site, place: Place) -> None:
        """Put in what the site needs."""
        state, module = self.state, place.module
        if place.tensor == "attention":
            self._attention(site, place)
        elif place.tensor == "input":
            self._before(module, InputHook(state, site))
        elif place.tensor == "output":
            self._after(module, OutputHook(state, site))
        elif place.tensor == "lookup":
            self._after(module, LookupHook(state, site))
        elif place.tensor == "weight":
            self._before(module, WeightHook(state, site, _is_turned(module)))
            self._after(module, WeightEnd(state), always=True)
        elif place.tensor == "skip":
            self._before(place.extra["stream"], StreamHook(state, site), with_kwargs=True)
            self._after(module, SkipHook(state, site))
        elif place.tensor == "block":
            forward = LayerForward(state, site, module, site.entry.noise == "batch", module.forward)
            state.switches.append((module.__dict__, "forward", forward))
        else:
            raise ConfigError(
                f"{place.kind!r} is not served at {place.path!r} yet ({place.tensor}); leave it out of the "
                "plan, or narrow the entry"
            )

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
        if place.kind == "key":
            attending.keys = site
        else:
            attending.weights = site
        attending.find_road()

    def _before(self, module: nn.Module, hook: Any, with_kwargs: bool = False) -> None:
        if self.fleeting:
            hooks: Any = module._forward_pre_hooks
            number = RemovableHandle(hooks).id
            self.state.switches.append((hooks, number, hook))
            if with_kwargs:
                self.state.switches.append((module._forward_pre_hooks_with_kwargs, number, True))
        else:
            self.removable.append(module.register_forward_pre_hook(hook, with_kwargs=with_kwargs))

    def _after(self, module: nn.Module, hook: Any, always: bool = False) -> None:
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
