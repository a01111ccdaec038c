"""Studies that are known by name. Plain values for `spec.make_spec`; knows nothing else."""

from __future__ import annotations

from typing import Any

from twodice.errors import ConfigError, nearest

STUDIES: dict[str, dict[str, Any]] = {
    "demo": {
        "settings": {
            "data": ["python-docs"],
            "model": "gpt2-pico",
            "share": 0.07,
            "vocabulary": 512,
            "context": 64,
            "batch": 8,
            "steps": 330,
            "dtype": "float32",
            "optimizer": {"lr": 2e-3},
            "evaluation": {"windows": 32},
        },
        "seeds": 5,
        "demo": True,
        "sampling": {"prompts": 24, "prompt_tokens": 16, "tokens": 48},
        "case": (
            "Text is scarce here on purpose, because that is when dropout is worth asking about: 7 "
            "% of the training part of Python's language reference, read about 16 times by a model "
            "of two layers. Share, learning rate and steps were chosen by about fifteen short trials, most "
            "on seeds outside the study and a few on its own, so that the arm 'neither' overfits well "
            "before the end and all fits into minutes on two cores. Some trials ran other arms too and "
            "their losses were seen; the choice was made by the arm 'neither'. Steps and type "
            "of products are fixed, so that the case is the same on every machine."
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
