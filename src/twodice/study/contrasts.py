"""What dropout alone does: the paired contrasts between arms that differ in dropout and in nothing else.

Pure arithmetic on the arms of a report; knows no records and no page.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from twodice.study import compare, schema

_OF_DROPOUT = {"dropout", "dropout_draw"}


def beyond_dropout(arm: schema.Arm, baseline: schema.Arm) -> list[str]:
    """The settings beside dropout in which an arm was asked to differ from the baseline."""
    ours, theirs = dict(arm.settings), dict(baseline.settings)
    return sorted(k for k in {*ours, *theirs} - _OF_DROPOUT if ours.get(k) != theirs.get(k))


def dropout_contrasts(arms: Sequence[schema.Arm], baseline: str) -> list[schema.Contrast]:
    """Each arm with dropout against the arm that is like it without, at the best step.

    Parameters
    ----------
    arms
        Those of the report, with the same seeds in the same order.
    baseline
        Its name; of two arms that are alike without dropout it is the one held against.

    Returns
    -------
    list[Contrast]
        In the order of the arms; an arm with dropout that no arm is like without is left out. The intervals
        are adjusted by Holm's method over these contrasts; one against the baseline, which was judged among
        the arms too, takes the wider of the two adjustments, so that no page says both "helps" of it and
        "cannot tell" of the arm.
    """
    without = sorted((arm for arm in arms if not arm.has_dropout), key=lambda arm: arm.name != baseline)
    pairs = []
    for arm in arms:
        like = next((other for other in without if not beyond_dropout(arm, other)), None)
        if arm.has_dropout and like is not None:
            pairs.append((arm, like))
    told = compare.compare_pairs(
        [
            (_losses(arm), _losses(like), arm.at_best.difference if like.name == baseline else None)
            for arm, like in pairs
        ]
    )
    return [
        schema.Contrast(
            arm=arm.name,
            against=like.name,
            at_best=difference,
            verdict=compare.verdict(difference),
            words=compare.words(difference),
        )
        for (arm, like), difference in zip(pairs, told, strict=True)
    ]


def _losses(arm: schema.Arm) -> np.ndarray:
    return np.asarray(arm.at_best.validation_nats_per_token.values, dtype=np.float64)
