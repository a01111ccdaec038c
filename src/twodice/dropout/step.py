"""One step of training as the sites see it: the snapshot that is entered, and the frame of one forward of the
root.

A snapshot holds what the masks of a step are a function of; a frame adds what one forward adds: its rows, its
positions and how often each site was visited. Knows neither hooks nor models.

Letters: B rows, T positions, S keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from twodice.errors import ConfigError, ContractError, ShapeError
from twodice.random.keys import Key

FORMULA = "(micro * world + rank) * rows + arange(rows)"
#: The draw of Monte Carlo, beside those of a step (0 or more).
MONTE_CARLO = -1


class Keys:
    """The keys of all sites of one attachment, for one draw of masks.

    As integers for eager code, and as tensors for a compiled graph: a key that was a constant there would
    compile anew for each draw.
    """

    def __init__(self, seed: int, draw: int, sites: Sequence[str]) -> None:
        self.seed = seed
        self.draw = draw
        self.sites = tuple(sites)
        self.first = tuple(site_key(seed, site, draw, 0) for site in sites)
        self._seed_text = str(seed)  # compiled code cannot take an integer of 64 bits
        self._draw_tensor = torch.tensor(draw, device="cpu")
        self._first_tensor = _as_signed([key.value for key in self.first])

    def of(self, index: int, visit: int) -> Key:
        """The key of a site at a visit of its (shared) module."""
        return site_key(self.seed, self.sites[index], self.draw, visit) if visit else self.first[index]

    def tensor_of(self, index: int, visit: int) -> torch.Tensor:
        """The same as a 0-dim int64 tensor, for a compiled graph."""
        if visit:
            key: torch.Tensor = later_key(self._draw_tensor, self._seed_text, self.sites[index], visit)
            return key
        return self._first_tensor[index]


@dataclass(eq=False)
class Snapshot:
    """What the masks of one step are a function of. Nothing in it changes after it was made, but the count of
    forwards.

    Attributes
    ----------
    step : int
        In [0, 2^32). For Monte Carlo, where many draws run in one pass, an int64 tensor (B,): the number of
        the draw of each row.
    keys : Keys
        Which draw of masks within the step, and the keys that follow.
    examples : int64 tensor (B,) or (B, T), callable or None
        Slots in the global batch; a callable makes them from the number of rows of a forward.
    positions : dict
        Positions that the caller gave: stack (None, ``encoder`` or ``decoder``) -> int64 tensor (B, T) or
        (1, T).
    thresholds : tuple of int
        One for each site, in [0, 65536].
    rates : int64 tensor
        The same thresholds as a tensor: a compiled graph takes them from here.
    step_tensor : int64 tensor ()
        The step, for a compiled graph.
    """

    step: int | torch.Tensor
    keys: Keys
    examples: torch.Tensor | Callable[[int], Any] | None
    positions: dict[str | None, torch.Tensor]
    thresholds: tuple[int, ...]
    rates: torch.Tensor
    step_tensor: torch.Tensor
    forwards: int = 0


def coordinate(values: Any, name: str, dimensions: tuple[int, ...]) -> torch.Tensor | None:
    """Return `values` as an int64 tensor whose values fit 32 bits, or raise.

    Raises
    ------
    ConfigError
        If the values are no integers, have another number of dimensions, or are outside [0, 2^32).
    """
    if values is None:
        return None
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        raise ConfigError(
            f"{name} must be integers in a tensor, an array or a list; got {values!r}"
        ) from None
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ConfigError(f"{name} must be integers; got {tensor.dtype}")
    if tensor.dim() not in dimensions:
        wanted = "(B,) or (B, T)" if dimensions == (1, 2) else "(B, T) or (1, T)"
        raise ConfigError(f"{name} must have shape {wanted}; got {tuple(tensor.shape)}")
    if tensor.numel() and not 0 <= int(tensor.min()) <= int(tensor.max()) < 2**32:
        raise ConfigError(f"{name} must be in [0, 2^32); got {int(tensor.min())} to {int(tensor.max())}")
    # A copy: the caller may go on writing into its own tensor, and a snapshot does not change.
    return tensor.to(torch.int64, copy=True)


class Frame:
    """One forward of the root within a step.

    Attributes
    ----------
    snapshot : Snapshot
        The step.
    rows : int or None
        B of this forward, where it is known.
    examples : int64 tensor (B,) or (B, T), or None
        Slots of its rows.
    positions : dict
        Stack -> int64 tensor (B, T) or (1, T); a stack that is not there has 0 .. T-1.
    visits : list of int
        How often each site was visited so far.
    entered : list of str or None
        The stacks whose base took its arguments so far.
    streams : dict
        What a site has seen of the residual stream and will need: number of the site -> tensor.
    again : bool
        Whether this is a recomputation.
    """

    __slots__ = ("again", "entered", "examples", "positions", "rows", "snapshot", "streams", "visits")

    def __init__(
        self,
        snapshot: Snapshot,
        rows: int | None,
        positions: dict[str | None, torch.Tensor],
        visits: list[int],
    ) -> None:
        self.snapshot = snapshot
        self.rows = rows
        self.examples = None if callable(snapshot.examples) else snapshot.examples
        self.positions = positions
        self.visits = visits
        self.again = False
        self.entered: list[str | None] = []
        self.streams: dict[int, torch.Tensor] = {}

    def repeated(self, visits: tuple[int, ...]) -> Frame:
        """Return the frame in which a part of this forward is computed again."""
        frame = Frame(self.snapshot, self.rows, dict(self.positions), list(visits))
        frame.examples = self.examples
        frame.again = True
        return frame


def open_frame(snapshot: Snapshot, rows: int | None, sites: int) -> Frame:
    """Return the frame of a new forward; `rows` are those of its input, where known.

    Raises
    ------
    ContractError
        For a second forward in a step that was entered without examples.
    ShapeError
        If the number of examples is not the number of rows.
    """
    if snapshot.examples is None:
        if snapshot.forwards > 0:
            raise ContractError(
                "a step without examples is for one forward only, because a second one would get the same "
                f"masks; enter it with examples={FORMULA}"
            )
        snapshot.forwards += 1
    frame = Frame(snapshot, None, dict(snapshot.positions), [0] * sites)
    if rows is not None:
        set_rows(frame, rows)
    return frame


def set_rows(frame: Frame, rows: int) -> None:
    """Note the number of rows of a forward and hold the examples against it."""
    if callable(frame.snapshot.examples) and frame.examples is None:
        made = frame.snapshot.examples(rows)
        if made is None:
            raise ConfigError(f"examples must make {rows} slots of {rows} rows; got None from the callable")
        # The compiler cannot look at values; what a callable makes is checked by eager forwards.
        compiling = torch.compiler.is_compiling()
        frame.examples = made if compiling else coordinate(made, "examples", (1, 2))
    examples = frame.examples
    if examples is not None and examples.shape[0] != rows:
        raise ShapeError(
            f"examples must have one entry for each row of the forward ({rows}); got "
            f"{tuple(examples.shape)}; the slots of a micro-batch are {FORMULA}"
        )
    frame.rows = rows


def site_key(seed: int, site: str, draw: int, visit: int) -> Key:
    """Return the key of a site: ``Key(seed).child("dropout", site, draw, visit)``.

    Of the draw `MONTE_CARLO` it is ``Key(seed).child("monte-carlo", site, visit)``.
    """
    if draw == MONTE_CARLO:
        return Key(seed).child("monte-carlo", site, visit)
    return Key(seed).child("dropout", site, draw, visit)


def _as_signed(bits: int | list[int]) -> torch.Tensor:
    return torch.tensor(bits, dtype=torch.uint64, device="cpu").view(torch.int64)


@torch.library.custom_op("twodice::later_key", mutates_args=())
def later_key(draw: torch.Tensor, seed: str, site: str, visit: int) -> torch.Tensor:
    """The key of a site at a later visit of its module, hashed when the graph runs.

    How often a module will be visited only its forward tells, so that no step can bring these keys along.
    """
    return _as_signed(site_key(int(seed), site, int(draw), visit).value)


@later_key.register_fake
def _(draw: torch.Tensor, seed: str, site: str, visit: int) -> torch.Tensor:
    return torch.empty((), dtype=torch.int64, device="cpu")
