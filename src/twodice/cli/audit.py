"""`twodice audit`: every place in a model where something may be dropped, and what a plan does there.

The model is built without weights (on torch's meta device), so that any size is listed in seconds.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import nn


def _config(model: str) -> Any:
    from twodice.errors import ConfigError, nearest
    from twodice.training.presets import PRESETS, preset_config

    if model in PRESETS:
        return preset_config(model, vocabulary=256, context=PRESETS[model].context, end_of_text=None)
    folder = Path(model)
    if not (folder / "config.json").is_file() or (folder / "model" / "config.json").is_file():
        folder = folder / "model"
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"a model must be a preset ({', '.join(PRESETS)}), a run, or a folder that holds config.json; "
            f"got {model!r}{nearest(model, PRESETS)}"
        )
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _build(model: str) -> nn.Module:
    import torch
    from transformers import AutoModelForCausalLM

    config = _config(model)
    with torch.device("meta"):
        built: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return built.train()


def audit(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A preset, a run, or a folder in Hugging Face format.")
    ],
    plan: Annotated[
        str, typer.Option("--plan", help="A plan's text or TOML file; without one all sites are free.")
    ] = "none",
    steps: Annotated[int | None, typer.Option(min=1, help="Length of the run, for fractions of it.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """List every place in a model where something may be dropped, live or not and why."""
    from twodice.dropout.attach import attach
    from twodice.dropout.audit import Audit, SiteRecord
    from twodice.dropout.plan import DropoutPlan
    from twodice.dropout.sites import find

    parsed = DropoutPlan.parse(plan)
    built = _build(model)
    handle = attach(built, parsed, total_steps=steps)
    found = handle.audit()
    handle.detach()
    spoken = {record.site for record in found.sites}
    free = [
        SiteRecord(p.name, "free", p.kind, 0.0, "-", False, "the plan does not speak of it", p.layer)
        for p in find(built).places
        if p.name not in spoken
    ]
    whole = Audit(found.model, found.plan, found.seed, (*found.sites, *free))
    if as_json:
        values = asdict(whole)
        del values["seed"]  # an audit draws nothing
        print(json.dumps(values, indent=2))
    else:
        print(str(whole).replace(f", seed {whole.seed},", ",", 1))
