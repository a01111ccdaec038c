"""The model of a run: new from a preset, or loaded from a folder in Hugging Face format.

Weights are read from safetensors only and code never comes from a model's folder. The model's own dropout
rates are set to 0: the plan decides what is dropped. Does not know data, nor the loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from twodice.errors import ConfigError, nearest
from twodice.text.store import TokenStore
from twodice.training.config import TrainConfig
from twodice.training.init import new_model
from twodice.training.presets import PRESETS, preset_config

_FINE_TUNE_LR = 5e-5
_FINE_TUNE_BATCH = 8
_FINE_TUNE_CONTEXT = 512


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a model by its name alone: the defaults that go with it."""

    is_folder: bool
    context: int
    longest: int | None
    batch: int
    lr: float
    tokenizer: str
    why: str


def read_folder_config(folder: str | Path) -> Any:
    """The transformers config of a local folder, without running code from it.

    Raises
    ------
    ConfigError
        The folder has no config or no safetensors.
    """
    from transformers import AutoConfig

    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"a model's folder must hold config.json; {folder} does not")
    if not list(folder.glob("*.safetensors")):
        raise ConfigError(
            f"weights are read from safetensors only; {folder} holds none (convert the model first)"
        )
    try:
        return AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise ConfigError(
            f"{folder}/config.json cannot be used without code from the folder: {error}"
        ) from None


def model_facts(name: str) -> ModelFacts:
    """The defaults that go with a preset or a folder.

    Raises
    ------
    ConfigError
        `name` is neither; the nearest preset is named.
    """
    if name in PRESETS:
        preset = PRESETS[name]
        return ModelFacts(False, preset.context, None, preset.batch, preset.lr, "bpe", f"preset {name}")
    if not Path(name).is_dir():
        raise ConfigError(
            f"model must be a preset ({', '.join(PRESETS)}) or a folder; got {name!r}{nearest(name, PRESETS)}"
        )
    folder = Path(name)
    # A run's own folder stands for the model in it.
    if (folder / "run.json").is_file() and (folder / "model").is_dir():
        folder = folder / "model"
    config = read_folder_config(folder)
    longest = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    context = _FINE_TUNE_CONTEXT if longest is None else min(_FINE_TUNE_CONTEXT, longest)
    why = f"fine-tuning {folder}"
    return ModelFacts(True, context, longest, _FINE_TUNE_BATCH, _FINE_TUNE_LR, str(folder), why)


def own_rates(config: Any) -> dict[str, float]:
    """The dropout rates above 0 that a transformers config holds itself, nested configs included."""
    found: dict[str, float] = {}
    for name, value in vars(config).items():
        if hasattr(value, "to_dict") and name != "quantization_config":
            found.update({f"{name}.{inner}": rate for inner, rate in own_rates(value).items()})
        elif ("dropout" in name or name.endswith("pdrop") or name == "layerdrop") and _is_rate(value):
            found[name] = float(value)
    return found


def _is_rate(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _without_rates(config: Any) -> None:
    for name in own_rates(config):
        *path, leaf = name.split(".")
        inner = config
        for part in path:
            inner = getattr(inner, part)
        setattr(inner, leaf, 0.0)


def build_model(config: TrainConfig, store: TokenStore) -> tuple[torch.nn.Module, list[str]]:
    """Make or load the model on the CPU in float32, and say what was changed in it.

    Parameters
    ----------
    config
        With `context` resolved.
    store
        The tokens; its vocabulary must fit the model.

    Randomness
    ----------
    Initial weights of a preset from ``Key(config.seed).child("init")``; a loaded model draws none.
    """
    if config.model in PRESETS:
        assert config.context is not None, "context is resolved before the model is made"
        shape = preset_config(
            config.model,
            vocabulary=store.vocabulary,
            context=config.context,
            end_of_text=store.end_of_document,
        )
        return new_model(shape, config.seed), []
    folder = model_facts(config.model).tokenizer
    shape = read_folder_config(folder)
    if store.vocabulary > shape.vocab_size:
        raise ConfigError(
            f"the tokens' vocabulary must fit the model; {config.model} has {shape.vocab_size}, the tokens "
            f"have {store.vocabulary} (leave --tokenizer away: the model's own is taken)"
        )
    rates = own_rates(shape)
    _without_rates(shape)
    model = load_folder(folder, shape)
    named = ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
    return model, [
        f"the model's own dropout ({named}) is set to 0: the plan decides what is dropped"
    ] if rates else []


def load_folder(folder: str | Path, config: Any = None) -> torch.nn.Module:
    """Load a causal language model in float32 from safetensors, without code from the folder and without a
    progress bar.

    Raises
    ------
    ConfigError
        transformers cannot load it.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    had_bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
            str(folder),
            config=config,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (ValueError, OSError) as error:
        raise ConfigError(f"cannot load the model in {folder}: {error}") from None
    finally:
        if had_bar:
            logging.enable_progress_bar()
    return model


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and lasting buffers by name, tied ones once; the tensors themselves, not copies."""
    weights = {name: parameter.data for name, parameter in model.named_parameters()}
    seen = {id(parameter) for parameter in model.parameters()}
    lasting = model.state_dict(keep_vars=True)
    for name, buffer in model.named_buffers():
        if name in lasting and id(buffer) not in seen:
            weights[name] = buffer
    return weights


@torch.no_grad()
def put_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Copy `weights` into the model in place; the names must be exactly those of `weights_of`."""
    own = weights_of(model)
    assert own.keys() == weights.keys(), (
        f"weights of another model: {sorted(own.keys() ^ weights.keys())[:5]}"
    )
    for name, tensor in own.items():
        tensor.copy_(weights[name])
