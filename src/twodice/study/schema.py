"""The shape of ``report.json``: what a study found, as numbers and as the words that may be said about them.

`summary` fills it from the records, the report draws from it, a program may read it. Knows neither torch nor
how anything
was measured. Unless a name says otherwise losses are in nats per token of the validation text B, on which no
choice was made.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from twodice.errors import DataError
from twodice.study.mechanisms.schema import Mechanisms
from twodice.study.parts import Estimate as Estimate
from twodice.study.parts import Part

Verdict = Literal["baseline", "helps", "hurts", "cannot tell"]


class Percent(Part):
    """A difference relative to the baseline's mean, in percent; negative means a lower loss."""

    mean: float
    low: float | None
    high: float | None


class Difference(Part):
    """An arm minus the baseline, paired by seed [nats per token]; negative means a lower loss.

    ``low`` and ``high`` are adjusted as the verdict is: they exclude 0 if and only if ``p_adjusted`` < 0.05.
    ``low_alone`` and ``high_alone`` are the plain 95 % t interval of this one comparison.
    """

    mean: float
    low: float | None
    high: float | None
    p: float | None
    p_adjusted: float | None
    more_seeds: int | None = Field(
        description="seeds beyond these that would probably (80 %) settle it; 0 where it is, null where "
        "more than 1000 would be needed or nothing can be said"
    )
    low_alone: float | None
    high_alone: float | None
    values: list[float] = Field(description="one per seed, in the order of the arm's seeds")
    percent: Percent


class Comparison(Part):
    """The losses of an arm at one moment: at its best step (chosen on validation A) or at the end."""

    steps: list[int] = Field(description="the step looked at, one per seed")
    train_nats_per_token: Estimate
    validation_nats_per_token: Estimate
    validation_bits_per_byte: Estimate
    gap_nats_per_token: Estimate
    difference: Difference | None
    verdict: Verdict


class Curve(Part):
    """Losses over the steps; every list has one entry per evaluation."""

    steps: list[int]
    train_nats_per_token: list[Estimate]
    validation_nats_per_token: list[Estimate]


class Arm(Part):
    """One setting of the study."""

    name: str
    settings: dict[str, Any] = Field(
        description="what it changes: 'dropout' (the plan's text) and settings by dotted name"
    )
    text: str = Field(description="the arm as one would type it after --arm NAME=")
    seeds: list[int]
    has_dropout: bool
    at_best: Comparison
    at_end: Comparison
    verdict: Verdict = Field(description="that of the best step")
    words: str = Field(description="the verdict in words, such as 'helps by 3.1 % [2.2, 4.0]'")
    words_at_end: str
    only_at_end: bool = Field(
        description="it wins at the end and is not shown to win at the best step, where all may stop early"
    )
    overfits_percent: float = Field(
        description="how far the mean loss at the end is above that at the best step, in percent"
    )
    curve: Curve
    tuned: dict[str, str] = Field(description="settings that were tuned for this arm, with the value taken")


class Contrast(Part):
    """An arm with dropout against the arm that differs from it in dropout alone: what dropout itself does."""

    arm: str
    against: str = Field(description="the arm without dropout that has all other settings of `arm`")
    at_best: Difference = Field(description="`arm` minus `against`, adjusted over all contrasts")
    verdict: Verdict
    words: str


class Setting(Part):
    """How the next token was chosen."""

    name: str = Field(description="'greedy', 'top-k 50', 'temperature 0.7, top-k 50', 'all tokens'")
    greedy: bool
    temperature: float
    top_k: int | None


class Measures(Part):
    """What texts are like; each a mean over the trained models (one per seed) with a 95 % t interval."""

    rep_4: Estimate = Field(description="share of repeated 4-grams of tokens within a text, in [0, 1]")
    looping_tails: Estimate = Field(description="share of the texts whose end loops, in [0, 1]")
    distinct_2: Estimate = Field(description="different 2-grams over all 2-grams, over the texts of one draw")
    self_bleu: Estimate = Field(description="how alike the texts of one draw are, in [0, 1]")
    own_nats_per_token: Estimate = Field(description="the model's own loss on its text")
    longest_copied_characters: Estimate = Field(description="longest run copied from the training text")
    longest_copied_most: int = Field(description="the longest of all texts")


class Sampling(Part):
    """One cell of the cross of the two dice."""

    arm: str
    setting: Setting
    texts: int = Field(description="continuations measured, over all seeds")
    measures: Measures


class HumanText(Part):
    """The same measures on how the held-out text really goes on after each prompt."""

    rep_4: float
    looping_tails: float
    distinct_2: float
    self_bleu: float
    longest_copied_characters: float
    texts: int


class Example(Part):
    """One continuation, to be read."""

    prompt: str
    arm: str
    setting: str = Field(description="name of the setting; 'human' for the held-out text itself")
    training_seed: int | None
    sampling_seed: int | None
    text: str
    rep_4: float
    longest_copied_characters: int
    copied_from: int = Field(description="where in `text` the longest copied run begins (characters)")


class Effect(Part):
    """How far one die moves one measure, paired by training seed; intervals are adjusted per die.

    The training die: with dropout minus without, over both settings. The generation die: drawn minus greedy,
    over both models. The loss on unseen text and the gap have no effect of the generation die: it never
    touches them. The interval of the loss is the adjusted one, by which the verdict goes.
    """

    measure: str = Field(description="a name of `Measures`, or of `Comparison`")
    die: Literal["training", "generation"]
    mean: float
    low: float | None
    high: float | None


class Cross(Part):
    """Which cells of `sampling` are the central table, and why these."""

    without: str = Field(description="arm without dropout")
    with_dropout: str | None = Field(description="arm with dropout; null where no arm has any")
    differs_in: list[str] = Field(
        description="settings beside dropout in which that arm differs from `without`; best none"
    )
    greedy: str = Field(description="name of the greedy setting")
    drawn: str = Field(description="name of the drawn setting")
    arms: list[str] = Field(description="the arms that generated, in order")
    reason: str
    prompts: int
    prompt_tokens: int
    tokens: int
    sampling_seeds: list[int]
    effects: list[Effect] = Field(default=[], description="filled by `effects.effects`")


class Facts(Part):
    """The text: how much of it, where from."""

    sources: list[str]
    share: float
    documents: int
    train_tokens: int
    train_bytes: int
    validation_a_tokens: int
    validation_b_tokens: int
    validation_b_bytes: int
    vocabulary: int
    tokenizer: str
    crosses_documents: bool
    digest: str
    entropy_nats_per_token: float | None


class Scored(Part):
    """How much of validation text B the losses at the best and at the last step are means over."""

    windows: int
    there: int = Field(description="windows that the text has in all")


class Model(Part):
    """What was trained."""

    name: str
    parameters: int
    context: int
    batch: int


class Sanity(Part):
    """A number that a loss can be held against."""

    name: str
    value: float
    unit: Literal["bits per byte", "nats per token"]
    words: str


class Plan(Part):
    """What this many pairs can detect, said before anything ran."""

    pairs: int
    smallest_difference_in_sd: Annotated[float, Field(gt=0)] | None
    words: str


class How(Part):
    """How everything was measured: sentences and commands."""

    notes: list[str]
    settings: dict[str, Any] = Field(description="what all arms start from, by dotted name")
    commands: dict[str, str] = Field(description="what to type for: study, report, generate, load")
    machine: dict[str, str]
    case: str | None = Field(description="how the case was chosen (demo)")


class Report(Part):
    """All of ``report.json``."""

    twodice: str
    answer: str = Field(description="the answer in one sentence")
    details: list[str] = Field(
        description="further sentences: only at the end, early stopping, overfitting, the cross"
    )
    data: Facts
    model: Model
    baseline: str
    best: str = Field(description="the arm that helps most; the baseline where none helps")
    best_seed: int
    best_step: int
    steps: int
    seeds: list[int]
    is_complete: bool = Field(description="false while trials are missing; what is here is then preliminary")
    confidence: float = 0.95
    primary: str = "validation_nats_per_token"
    arms: list[Arm]
    scored_on: Scored | None = Field(
        default=None, description="null where the losses are those of the windows of the evaluations"
    )
    dropout_contrasts: list[Contrast] = Field(
        default=[], description="what dropout alone does; the answer credits dropout with nothing else"
    )
    mechanisms: Mechanisms | None = Field(
        default=None, description="what dropout did inside; null where the trials were not measured so"
    )
    sampling: list[Sampling]
    human: HumanText | None
    cross: Cross | None
    examples: list[Example]
    sanity: list[Sanity]
    plan: Plan
    how: How

    def as_json(self) -> str:
        """The text of ``report.json``: fixed order, no clock, the same bytes for the same records."""
        return json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def read_report(path: Path) -> Report:
    """Read ``report.json``.

    Raises
    ------
    DataError
        The file is missing or is not of this shape.
    """
    try:
        return Report.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}; twodice study writes it") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        fault = "is missing" if first["type"] == "missing" else "is not of its kind"
        raise DataError(f"{path} is not the report of a study: {place or 'the whole'} {fault}") from None
