"""A model, its tokenizer and its defaults from a folder: a run of twodice, or any folder in Hugging Face
format.

Reads safetensors and JSON only, runs no code that comes with a model, and uses the network only for
``hf:NAME``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twodice.errors import CheckpointError, ConfigError
from twodice.sampling.params import SamplingParams

#: Says that a name is meant on the hub; a folder that is missing never becomes a download.
HUB_PREFIX = "hf:"


@dataclass(frozen=True)
class Loaded:
    """What a folder held.

    `written` are the fields of its ``generation_config.json`` as they stand there, `defaults` what they mean;
    both empty and neutral where there is no such file.
    """

    model: Any
    tokenizer: Any
    folder: str
    written: dict[str, Any]
    defaults: SamplingParams


def find_model(source: str | Path) -> Path:
    """The folder that holds the model: the one named, or ``model`` inside it where it is a run.

    Raises
    ------
    ConfigError
        If there is no such folder, or no ``config.json`` of a model in it.
    CheckpointError
        If the run is not finished, or there are no safetensors.
    """
    folder = Path(source)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ConfigError(
            f"a model needs a run folder or a folder in Hugging Face format; {str(source)!r} {what} "
            f"(for a model on the hub write {HUB_PREFIX}{source})"
        )
    inner = folder / "model"
    if inner.is_dir():
        folder = inner
    elif (folder / "checkpoints").is_dir():
        raise CheckpointError(
            f"the run {str(source)!r} has no model yet; run its training command again to finish it"
        )
    if not (folder / "config.json").is_file():
        best = folder / "best"
        hint = f"; a study's best model is in {str(best)!r}" if (best / "config.json").is_file() else ""
        raise ConfigError(f"a model folder must hold a config.json; {str(folder)!r} has none{hint}")
    if not any(folder.glob("*.safetensors")):
        others = sorted(
            path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt")
        )
        came = f"got {', '.join(others)}, which may run code when read" if others else "got none"
        raise CheckpointError(f"weights are read from *.safetensors only; {came} in {str(folder)!r}")
    return folder


def read_generation_config(folder: Path) -> dict[str, Any]:
    """The fields of ``generation_config.json`` as written, or none."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} must hold one JSON object; got {type(found).__name__}")
    return found


def load(source: str | Path, *, device: str = "cpu") -> Loaded:
    """Load from `source`; see `find_model` for what it may be, and ``hf:NAME`` for the hub."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    is_hub = isinstance(source, str) and source.startswith(HUB_PREFIX)
    name = str(source)[len(HUB_PREFIX) :] if is_hub else str(find_model(source))
    options = {"trust_remote_code": False, "local_files_only": not is_hub}
    had_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        model = AutoModelForCausalLM.from_pretrained(name, use_safetensors=True, **options)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().split("\n")[0]
        raise CheckpointError(f"{name!r} could not be loaded: {first}") from error
    finally:
        if had_bars:
            logging.enable_progress_bar()
    if is_hub:
        written = model.generation_config.to_diff_dict() if model.can_generate() else {}
    else:
        written = read_generation_config(Path(name))
    defaults = SamplingParams.from_generation_config(written) if written else SamplingParams()
    return Loaded(model.to(device).eval(), tokenizer, name, written, defaults)
