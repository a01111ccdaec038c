"""The measures by name: what each is called on the page, in which unit, and what it means. Loads no torch.

`measure` takes them, the report and the documentation speak of them; a name stands here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

#: The masks under which every arm is averaged alike, whatever it was trained with.
REFERENCE_PLAN = "residual=0.1"
#: Share of the characters that are replaced.
NOISE = 0.05
#: K, draws of masks.
DRAWS = 16
#: The texts that stand for another domain: the second where the first was trained on.
DOMAINS = ("Python’s language reference", "random letters of a Markov source (16 symbols, order 2)")


class Measure(NamedTuple):
    """A line of the table; `kind` is how `words.number` writes its values.

    What arms measure each under its own masks is not compared.
    """

    field: str
    title: str
    short: str
    kind: str
    is_compared: bool = True


MEASURES = (
    Measure(
        "head_similarity",
        "Likeness of heads",
        "how alike two heads of a layer attend, from 0 (they share no token) to 1",
        "nats",
    ),
    Measure("head_entropy", "Width of heads", "entropy of a head’s attention weights, nats", "nats"),
    Measure(
        "head_removed",
        "One head removed",
        "rise of the loss when a single head is set to 0, mean over heads, thousandths of a nat per token",
        "milli",
    ),
    Measure(
        "head_removed_most",
        "The head that counts most",
        "the largest of these rises, thousandths of a nat per token",
        "milli",
    ),
    Measure(
        "unit_removed",
        "One unit removed",
        "rise of the loss when a single unit of a feed-forward is set to 0, mean over units, thousandths of "
        "a nat per token",
        "milli",
    ),
    Measure(
        "unit_correlation",
        "Co-adaptation of units",
        "absolute correlation of two units of a feed-forward, from 0 to 1",
        "nats",
    ),
    Measure(
        "noise_loss",
        "Loss on noisy text",
        f"{100 * NOISE:g} % of the characters replaced at random, bits per byte",
        "nats",
    ),
    Measure(
        "noise_rise",
        "Cost of the noise",
        "the same less the loss on the text as it is, bits per byte",
        "nats",
    ),
    Measure("domain_loss", "Loss on another domain", "text unlike the training text, bits per byte", "nats"),
    Measure(
        "ensemble_gain",
        "Averaging masks",
        f"loss of the mean of {DRAWS} draws of {REFERENCE_PLAN} less that of one pass without dropout, "
        "thousandths of a nat per token; below 0 the average is better",
        "milli",
    ),
    Measure(
        "ensemble_distance",
        "One pass for many",
        "divergence of the pass without dropout from the geometric mean of these draws, thousandths "
        "of a nat per token; 0 where one pass stands for all",
        "milli",
    ),
    Measure(
        "own_ensemble_gain",
        "Averaging its own masks",
        "as averaging masks, with the arm’s own plan; only where an arm drops units",
        "milli",
        is_compared=False,
    ),
)
FIELDS = tuple(one.field for one in MEASURES)


def other_domain(sources: Sequence[str]) -> str:
    """Which of `DOMAINS` none of the `sources` that were trained on is."""
    return DOMAINS["python-docs" in sources]
