"""Studies that are known by name. Plain values for `spec.make_spec`; knows nothing else."""

from __future__ import annotations

from typing import Any

from twodice.errors import ConfigError, nearest

STUDIES: dict[str, dict[str, Any]] = {
    "demo": {
        "settings": {
            "data": ["python-docs"],
            "model": "gpt2-pico",
            "share": 0.06,
            "vocabulary": 512,
            "context": 64,
            "batch": 8,
            "steps": 320,
            "optimizer": {"lr": 4e-3},
            "evaluation": {"windows": 32},
        },
        "seeds": 5,
        "demo": True,
        "sampling": {"prompts": 12, "prompt_tokens": 16, "tokens": 48},
        "case": (
            "Text is scarce here on purpose, because that is when dropout is worth asking about: 6 "
            "% of the training part of Python's language reference, read about 20 times by a model "
            "of two layers. Sizes and steps were tried on a seed outside the study and judged by "
            "one thing only: that without dropout the loss on unseen text rises again before the "
            "end, within minutes on two cores. Which arm would win played no part. The steps are "
            "fixed, so that the case is the same on every machine."
        ),
    },
}


def study_preset(name: str) -> dict[str, Any]:
    """The keyword arguments of `spec.make_spec` that a name stands for.

    Raises
    ------
    ConfigError
        No study of that name.
    """
    if name not in STUDIES:
        raise ConfigError(
            f"--preset must be one of {', '.join(STUDIES)}; got {name!r}{nearest(name, STUDIES)}"
        )
    return {**STUDIES[name], "settings": dict(STUDIES[name]["settings"])}
