"""What the shapes of a report are made of: a frozen part, and a mean over seeds. Loads no torch."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Part(BaseModel):
    """Frozen, nothing unknown; neither NaN nor infinity (JSON has none)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class Estimate(Part):
    """A mean over seeds with its own 95 % t interval (null where there is one seed only)."""

    mean: float
    low: float | None
    high: float | None
    values: list[float] = Field(description="one per seed, in the order of the arm's seeds")
