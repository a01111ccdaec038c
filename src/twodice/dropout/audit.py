"""What an audit shows: every site with its rate and schedule, live or not and why; and the dropout a model
brings along.

Records first, the table from the records. Knows no torch.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class SiteRecord:
    """One line of an audit.

    Attributes
    ----------
    site : str
        Name of the site, or path of the model's own dropout, or field of its config.
    source : str
        ``plan`` (a site that the plan speaks of), ``model`` (own dropout), ``config`` (a rate that nothing
        reads), ``random`` (chance outside every plan) or ``undecided`` (what could not be told).
    kind : str
        Kind of the plan, or what the own dropout is.
    rate : float
        The highest rate of the schedule, or the own rate.
    schedule : str
        The schedule's text.
    live : bool
        Whether units are dropped there in a training step.
    why : str
        The reason, in words.
    layer : int or None
        Number of the block.
    """

    site: str
    source: str
    kind: str
    rate: float
    schedule: str
    live: bool
    why: str
    layer: int | None = None


@dataclass(frozen=True)
class Audit:
    """What `Handle.audit` found. ``str`` is a table, `to_json` the same for programs.

    Attributes
    ----------
    model : str
        Class of the model.
    plan : str
        Text of the plan.
    seed : int
        The seed of the masks.
    sites : tuple of SiteRecord
        Sites of the plan, own dropout, rates that nothing reads, in this order.
    """

    model: str
    plan: str
    seed: int
    sites: tuple[SiteRecord, ...]

    @property
    def live(self) -> tuple[SiteRecord, ...]:
        """The records that drop units in a training step."""
        return tuple(record for record in self.sites if record.live)

    def to_json(self) -> str:
        """Return the audit as JSON text."""
        values = {
            "model": self.model,
            "plan": self.plan,
            "seed": self.seed,
            "sites": [asdict(r) for r in self.sites],
        }
        return json.dumps(values, indent=2)

    def __str__(self) -> str:
        head = f"{self.model}, seed {self.seed}, plan: {self.plan}"
        if not self.sites:
            return f"{head}\nno dropout anywhere"
        rows = [("site", "source", "schedule", "live", "why")]
        rows += [(r.site, r.source, r.schedule, "yes" if r.live else "no", r.why) for r in self.sites]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4]])
            for row in rows
        ]
        return "\n".join([head, *lines])
