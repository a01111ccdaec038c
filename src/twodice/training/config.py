"""What a run is told: one frozen tree of settings, checked at birth; its descriptions are the help text and
the docs.

Holds the fields, the reading of files (TOML, JSON, a run's own config.json) and the changing of one setting
by name. Does not know what a default is resolved to (`budget`), nor anything of torch: a program without
torch may read it.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from twodice.errors import ConfigError
from twodice.training.fields import fields_of, in_words, nearest_field

#: Repeating a text up to so often is nearly as good as fresh text (Muennighoff et al. 2023, section 5).
FEW_EPOCHS = 4

_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Rate = Annotated[float, Field(ge=0, lt=1)]


class _Settings(BaseModel):
    """Frozen, nothing unknown, nothing ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), validate_default=True)


class OptimizerConfig(_Settings):
    """AdamW and the schedule of its learning rate."""

    lr: _Positive | None = Field(default=None, description="peak learning rate; default by size of the model")
    min_lr: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="learning rate at the end of the schedule; default a tenth of lr"
    )
    beta1: _Rate = Field(default=0.9, description="decay of the mean of the gradients, in [0, 1); as GPT-3's")
    beta2: _Rate = Field(
        default=0.95, description="decay of the mean of their squares, in [0, 1); as GPT-3's"
    )
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        default=0.1,
        description="decoupled decay of matrices (not of biases and norms), per step times the learning "
        "rate; as GPT-3's",
    )
    clip: _Positive | None = Field(
        default=1.0, description="largest norm of the gradient, as GPT-3's; none switches clipping off"
    )
    warmup: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="steps of linear warm-up; default 5 % of the steps, at most 200"
    )
    schedule: Literal["cosine", "trapezoid", "constant"] = Field(
        default="cosine",
        description="after warm-up: cosine to min_lr; flat, then a linear fall over the last fifth; or flat",
    )


class EvaluationConfig(_Settings):
    """When and on how much text the losses are measured."""

    every: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="steps between evaluations; default a twentieth of the run, or so that they take 15 %",
    )
    windows: Annotated[int, Field(ge=1)] = Field(
        default=64, description="windows of each part (train, validation A and B), the same every time"
    )


class CheckpointConfig(_Settings):
    """When the state is saved and how much of it is kept."""

    every: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="steps between checkpoints; default a twentieth of the run"
    )
    keep: Annotated[int, Field(ge=1)] = Field(
        default=2, description="how many of the last checkpoints stay, besides step 0 and the best"
    )


class TrainConfig(_Settings):
    """Everything that a run's result is a function of, together with the text and the machine."""

    data: tuple[str, ...] = Field(
        default=("python-docs",),
        min_length=1,
        description="text files, folders, .jsonl, .parquet, or python-docs (embedded) or markov (drawn)",
    )
    field: str = Field(default="text", description="name of the text field in JSONL and Parquet")
    share: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0, description="share of the training part that is kept, in (0, 1]; chosen by key"
    )
    model: str = Field(
        default="gpt2-nano", description="a preset, or a folder in Hugging Face format, which is fine-tuned"
    )
    dropout: str = Field(
        default="none", description="plan of dropout, such as 'embedding=0.1, residual=0.1'; none for none"
    )
    dropout_draw: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        default=0,
        description="which of the sets of masks: another number, other masks, everything else the same",
    )
    tokenizer: str | None = Field(
        default=None,
        description="kind: bpe (learned here), bytes, or a folder; default bpe, or the model's own",
    )
    vocabulary: Annotated[int, Field(ge=2)] | None = Field(
        default=None, description="vocabulary of a trained tokenizer; default from the amount of text"
    )
    context: Annotated[int, Field(ge=2)] | None = Field(
        default=None, description="tokens that the model sees at once; default by preset"
    )
    steps: Annotated[int, Field(ge=1)] | None = Field(default=None, description="optimizer steps")
    epochs: _Positive | None = Field(default=None, description="passes over the training text")
    minutes: _Positive | None = Field(default=None, description="time to train on this machine")
    batch: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="windows in a step, over all of accumulate"
    )
    accumulate: Annotated[int, Field(ge=1)] = Field(
        default=1, description="micro-batches that a step is split into (less memory, the same result)"
    )
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] = Field(
        default=0, description="seed of the initial weights, the order of the data and the masks of dropout"
    )
    device: str = Field(default="auto", description="where: auto, cpu, cuda, cuda:1, mps")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="type of products (weights: float32); auto: bfloat16 where the device has it",
    )
    threads: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="threads on the CPU; default what torch takes"
    )
    optimizer: OptimizerConfig = Field(default=OptimizerConfig(), description="the optimizer")
    evaluation: EvaluationConfig = Field(default=EvaluationConfig(), description="the evaluations")
    checkpoint: CheckpointConfig = Field(default=CheckpointConfig(), description="the checkpoints")

    @model_validator(mode="after")
    def _across_fields(self) -> TrainConfig:
        lengths = {
            n: getattr(self, n) for n in ("steps", "epochs", "minutes") if getattr(self, n) is not None
        }
        if len(lengths) > 1:
            raise ValueError(f"give one of steps, epochs, minutes; got {lengths}")
        if self.batch is not None and self.batch % self.accumulate:
            raise ValueError(
                f"batch must be a multiple of accumulate; got {self.batch} and {self.accumulate}"
            )
        return self

    def as_json(self) -> str:
        """The tree as JSON text, read back by `read_config`."""
        return json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"


def setting_names() -> dict[str, Any]:
    """Every setting's dotted name and its pydantic field, in order of declaration."""
    return dict(fields_of(TrainConfig))


def make_config(values: Mapping[str, Any], *, where: str | None = None) -> TrainConfig:
    """Check a tree of plain values; an error begins with `where` they stand, if that is given.

    Raises
    ------
    ConfigError
        An unknown name (with the nearest), or a value outside its range, named by its dotted path.
    """
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        said = in_words(error, TrainConfig)
        raise ConfigError(said if where is None else f"{where}: {said}") from None


def read_settings(path: str | Path) -> dict[str, Any]:
    """Plain values from a TOML file or a JSON file (such as a run's ``config.json``), unchecked."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the settings in {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} must be UTF-8; it is not at byte {error.start}") from None
    try:
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise ConfigError(f"{path} must be {kind}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold settings by name; got a {type(values).__name__}")
    return values


def read_config(path: str | Path) -> TrainConfig:
    """A checked configuration from a TOML or JSON file."""
    return make_config(read_settings(path), where=str(path))


def full_name(name: str) -> str:
    """The dotted name of a setting given by its dotted name or by its last part where only one ends so.

    Raises
    ------
    ConfigError
        No such setting (the nearest is named), or several.
    """
    names = setting_names()
    if name in names:
        return name
    endings = [n for n in names if n.rpartition(".")[2] == name]
    if len(endings) == 1:
        return endings[0]
    if endings:
        raise ConfigError(f"{name!r} may mean {' or '.join(endings)}; write it in full")
    raise ConfigError(f"no setting {name!r}{nearest_field(name, TrainConfig)}")


def with_setting(config: TrainConfig, name: str, value_text: str) -> TrainConfig:
    """Return `config` with one setting changed, both given as text.

    Parameters
    ----------
    config
        Stays as it is.
    name
        Dotted name (``optimizer.lr``), or its last part where it is unique (``lr``).
    value_text
        The value as one would type it; ``none`` for absent; commas between several sources of data.

    Raises
    ------
    ConfigError
        No such setting (with the nearest name), or a value that it cannot take.
    """
    name = full_name(name)
    value: Any = value_text.strip()
    annotation = setting_names()[name].annotation
    if name == "data":
        value = [part.strip() for part in value.split(",") if part.strip()]
    elif value.lower() in ("none", "null") and _may_be_none(annotation):
        value = None
    return with_value(config, name, value)


def with_value(config: TrainConfig, name: str, value: Any) -> TrainConfig:
    """Return `config` with the setting of this dotted name changed to `value`, checked as a whole."""
    values = config.model_dump()
    group, _, leaf = name.rpartition(".")
    (values[group] if group else values)[leaf] = value
    if name in ("steps", "epochs", "minutes"):
        # Saying one length anew takes back the other.
        for other in {"steps", "epochs", "minutes"} - {name}:
            values[other] = None if value is not None else values[other]
    return make_config(values)


def _may_be_none(annotation: Any) -> bool:
    if get_origin(annotation) in (Union, UnionType):
        return NoneType in get_args(annotation)
    return annotation is NoneType
