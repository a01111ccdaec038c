"""Which places of a model a plan speaks of, and what the model makes impossible in it.

Reads a plan and an inventory and changes neither, but for what it could not decide, which it notes in the
inventory for the audit. `attach` then puts in what was chosen.
"""

from __future__ import annotations

from torch import nn

from twodice.dropout.places import Inventory, OwnDropout, Place
from twodice.dropout.plan import KINDS, DropoutPlan, Entry
from twodice.dropout.schedules import Schedule
from twodice.dropout.wrappers import join
from twodice.errors import ConfigError, nearest


def choose(found: Inventory, plan: DropoutPlan) -> list[tuple[Place, Entry, Schedule]]:
    """The sites that the plan speaks of, each with its entry and its own schedule, in the order of the
    model.
    """
    chosen: dict[str, tuple[Place, Entry, Schedule]] = {}
    for entry in plan.entries:
        places = _places_of(found, entry)
        layers: dict[str | None, list[int]] = {}
        for place in places:
            if place.layer is not None and place.layer not in layers.setdefault(place.stack, []):
                layers[place.stack].append(place.layer)
        for place in places:
            if place.name in chosen:
                raise ConfigError(
                    f"each site must be spoken of once; {str(chosen[place.name][1])!r} and {str(entry)!r} "
                    f"both reach {place.name!r}; narrow one by place or layers, or leave it out"
                )
            schedule = entry.schedule
            if place.layer is not None:
                among = sorted(layers[place.stack])
                schedule = schedule.at(among.index(place.layer), len(among))
            chosen[place.name] = place, entry, schedule
    for own in found.own:
        twice = f"{own.path}#dropout"
        if own.feeds in chosen and twice in chosen:
            raise ConfigError(
                f"each tensor must be spoken of once; {str(chosen[own.feeds][1])!r} and "
                f"{str(chosen[twice][1])!r} reach the same tensor at {own.path!r}; leave one out, or narrow "
                "'dropout' by its path"
            )
    return [chosen[place.name] for place in found.places if place.name in chosen]


def _places_of(found: Inventory, entry: Entry) -> list[Place]:
    """The places that one entry speaks of; none is an error that says what there is."""
    model = type(found.root).__name__
    places = [place for place in found.places if place.kind == entry.kind]
    if not places:
        there = ", ".join(found.kinds) if found.kinds else "none"
        raise ConfigError(
            f"{entry.kind!r} has no site in {model}; the kinds there are: {there}; write one of these, or "
            "leave the entry out"
        )
    if entry.place is not None and KINDS[entry.kind].places is None:
        # A path names modules, or, where one holds several matrices, one of these (lstm.weight_hh_l0).
        paths = {place.name: join(place.path, place.extra.get("parameter", "")) for place in places}
        inside = f"{entry.place}."
        places = [p for p in places if f"{paths[p.name]}.".startswith(inside)]
        if not places:
            what = "nn.Dropout" if entry.kind == "dropout" else "weight"
            known = [path.removesuffix(".weight") for path in paths.values()]
            hint = nearest(entry.place, known) or f"; a path is such as {known[0]!r}"
            raise ConfigError(f"{entry.target!r} matches no {what} of {model}{hint}")
    else:
        if entry.stack is not None:
            places = [place for place in places if place.stack == entry.stack]
        if entry.part is not None:
            # The attention of a stack on itself has no part of its own where the kind is one of attention.
            part = {"self": None}.get(entry.part, entry.part)
            places = [place for place in places if place.part == part]
        if not places:
            raise ConfigError(f"{entry.target!r} has no site in {model}; leave {entry.place!r} out")
    if entry.kind == "weight" and entry.noise != "tied":
        spoken, places = places, [place for place in places if not _is_second_use(found, place)]
        if not places:
            here = "" if entry.place is None else f"{entry.target}:tied for this use of it, or "
            others = sorted({path for place in spoken for path in place.extra["tied"]})
            raise ConfigError(
                f"a matrix that several modules share is dropped in its lookup alone; {entry.target!r} names "
                f"no lookup in {model}, but what {', '.join(map(repr, others))} has too; write "
                f"{here}weight:tied for every use"
            )
    if entry.layers is not None:
        count = 1 + max(place.layer for place in places if place.layer is not None)
        for end in (entry.layers.start, entry.layers.stop):
            if end is not None and not -count <= end <= count:
                raise ConfigError(
                    f"layers of {model} must be 0 to {count - 1}, or -{count} to -1 from the end; got "
                    f"{entry.target!r}"
                )
        # Stacks may differ in depth: a negative number counts from the end of each.
        places = [
            place
            for place in places
            if place.layer
            in entry.layers.indices(
                1 + max(p.layer for p in places if p.layer is not None and p.stack == place.stack)
            )
        ]
        if not places:
            raise ConfigError(
                f"an entry must name a layer; {entry.target!r} names none of the {count} of {model}"
            )
    return places


def _is_second_use(found: Inventory, place: Place) -> bool:
    """Whether a weight is a lookup's that another module uses too; then the lookup alone drops it."""
    tied = place.extra["tied"]
    if not tied or isinstance(place.module, nn.Embedding):
        return False
    others = ", ".join(map(repr, tied))
    why = f"its weight is that of {others}, and is dropped in the lookup alone; write weight:tied for both"
    found.undecided.append((place.path, why))
    return True


def refuse_halves(owned: list[OwnDropout], spoken: set[str]) -> None:
    """One number of the model's own may feed several tensors; a plan must speak of all of them or of none."""
    for own in owned:
        missing = [name for name in own.shared if name not in spoken]
        if own.rate > 0 and missing and len(missing) < len(own.shared):
            raise ConfigError(
                f"the model's own {own.attribute!r} at {own.path!r} ({own.rate}) drops at "
                f"{', '.join(map(repr, own.shared))} together; the plan leaves out "
                f"{', '.join(map(repr, missing))}: speak of all of them, or make the model with rate 0"
            )
