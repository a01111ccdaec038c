"""Studies that are known by name. Plain values for `spec.make_spec`; knows nothing else."""

from __future__ import annotations

from typing import Any

from twodice.errors import ConfigError, nearest

STUDIES: dict[str, dict[str, Any]] = {
    "demo": {
        "settings": {
            "data": ["python-docs"],
            "model": "gpt2-nano",
            "share": 0.125,
            "vocabulary": 512,
            "context": 64,
            "batch": 16,
            "minutes": 4.8,
            "optimizer": {"lr": 3e-3},
            "evaluation": {"windows": 96},
        },
        "seeds": 5,
        "demo": True,
        "sampling": {"prompts": 12, "prompt_tokens": 16, "tokens": 48},
        "case": (
            "The case was chosen so that text is scarce, which is when dropout is worth asking about: an "
            "eighth of the "
            "training part of Python's language reference, which the model reads many times within the "
            "minutes given. "
            "The sizes were tried on seeds outside the study and judged by one thing only: that without "
            "dropout the "
            "loss on unseen text rises again before the end. Which arm would win played no part in the "
            "choice."
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
