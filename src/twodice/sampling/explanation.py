"""What is known of one token that was drawn: plain records, and the JSON that a page or a table draws.

The file knows no logits and loads no torch; ``twodice.sampling.explain`` fills it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Named = tuple[int, str, float]
"""A token: its id, its text, and its probability under the model, before any setting."""


@dataclass(frozen=True, slots=True)
class Edit:
    """What one setting of stages 2 and 3 did to single logits.

    Attributes
    ----------
    name
        The setting and its value.
    moved
        (id, text, logit before, logit after) of each token that it moved and left possible, the largest
        change first.
    banned
        How many tokens it made impossible.
    banned_top
        The most probable of these.
    """

    name: str
    moved: tuple[tuple[int, str, float, float], ...]
    banned: int
    banned_top: tuple[Named, ...]


@dataclass(frozen=True, slots=True)
class Stage:
    """What one stage that removes tokens left.

    Attributes
    ----------
    name
        The stage and its value.
    kept
        Tokens that were left.
    mass
        What was left of the distribution at the temperature in force, in (0, 1].
    temperature
        In force at this stage: 1 where the row's temperature comes behind it.
    entropy_before, entropy
        Of the distribution that the stage was given, and of the one that it left [nats].
    removed
        How many tokens it removed.
    removed_top
        The most probable of these.
    """

    name: str
    kept: int
    mass: float
    temperature: float
    entropy_before: float
    entropy: float
    removed: int
    removed_top: tuple[Named, ...]


@dataclass(frozen=True, slots=True)
class Explanation:
    """How one token came to be drawn.

    Attributes
    ----------
    position, completion, seed
        The coordinates of the draw; the seed also where `sample` made one.
    token, text
        The token drawn; its text is empty without a tokenizer.
    believed
        The model's most probable tokens, before any setting.
    edits
        What bias, masks, bans and penalties did, those that were on.
    order
        The stages that are on, as they ran, the temperature among them.
    stages
        What each of them left that can remove tokens, in that order.
    temperature
        In force at the draw; 0 where no draw was used.
    probability
        The model's own for the token drawn, before any setting.
    odds
        With which it was drawn, after all stages.
    rank
        Tokens that stood before it, after the edits: 0 is the most probable.
    kept, kept_mass
        Tokens that it was drawn from, and their share of the distribution after temperature.
    model_entropy, edited_entropy, entropy
        Of the model's distribution, of that after the edits, and of the one drawn from [nats].
    state, next_state
        Mirostat's mu before and after [bits]; None where it is off, or at its start.
    """

    position: int
    completion: int
    seed: int
    token: int
    text: str
    believed: tuple[Named, ...]
    edits: tuple[Edit, ...]
    order: tuple[str, ...]
    stages: tuple[Stage, ...]
    temperature: float
    probability: float
    odds: float
    rank: int
    kept: int
    kept_mass: float
    model_entropy: float
    edited_entropy: float
    entropy: float
    state: float | None
    next_state: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, texts and lists for JSON: no NaN and no infinity."""
        return {
            "position": self.position,
            "completion": self.completion,
            "seed": self.seed,
            "token": self.token,
            "text": self.text,
            "model_probability": self.probability,
            "rank": self.rank,
            "odds": self.odds,
            "temperature": self.temperature,
            "kept": self.kept,
            "kept_mass": self.kept_mass,
            "entropy": {"model": self.model_entropy, "edited": self.edited_entropy, "drawn": self.entropy},
            "state": {"before": self.state, "after": self.next_state},
            "order": list(self.order),
            "edits": [
                {
                    "setting": one.name,
                    "moved": [
                        dict(zip(("token", "text", "before", "after"), moved, strict=True))
                        for moved in one.moved
                    ],
                    "banned": one.banned,
                    "banned_top": _listed(one.banned_top),
                }
                for one in self.edits
            ],
            "stages": [
                {
                    "stage": one.name,
                    "kept": one.kept,
                    "mass": one.mass,
                    "temperature": one.temperature,
                    "entropy_before": one.entropy_before,
                    "entropy": one.entropy,
                    "removed": one.removed,
                    "removed_top": _listed(one.removed_top),
                }
                for one in self.stages
            ],
            "believed": _listed(self.believed),
        }


def _listed(tokens: Iterable[Named]) -> list[dict[str, Any]]:
    return [dict(zip(("token", "text", "probability"), token, strict=True)) for token in tokens]
