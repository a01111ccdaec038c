"""What the sampling kernels take and give: rows of settings packed into one table, the past, the result.

A row runs a *program*: the codes of its stages in the order in which they run, with the rules that engines
differ in as flags. A stage that is off is not in the program. The file knows no logits and no names of
settings (``twodice.sampling`` turns these into programs).

Letters: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import IntEnum, IntFlag
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

MAX_VOCABULARY = 1 << 20  # masses are at most 2^42 each, so their sum stays below 2^63


class Status(IntEnum):
    """What became of a row."""

    OK = 0
    NAN = 1
    INFINITE = 2
    EMPTY = 3


class Stage(IntEnum):
    """One step of a program, on the logits as the edits left them. Each keeps a range of the rank order."""

    TEMPERATURE = 1
    DYNATEMP = 2
    GREEDY = 3
    TOP_N_SIGMA = 4
    TOP_K = 5
    TOP_P = 6
    MIN_P = 7
    TOP_H = 8
    TYPICAL = 9
    EPSILON = 10
    ETA = 11
    XTC = 12
    MIROSTAT = 13


class Rule(IntFlag):
    """Where engines differ; the contract's own rule is the flag's absence."""

    TIES_AT_K = 1
    """Top-k keeps every token that ties with the k-th; epsilon and eta every one that ties with the first."""
    HIGH_ID_FIRST = 2
    """Among equal logits the higher id stands earlier in the rank order."""
    JOINT = 4
    """Top-p counts its mass over everything that is alive, not over what the stages before kept, and the
    token behind a prefix that reaches p exactly stays too."""
    COUNT_PROMPT = 8
    """Presence and frequency penalties count the prompt too."""
    XTC_EXPECTED = 16
    """XTC re-weights by its expectation; no coin is thrown."""
    TOP_H_OF_100 = 32
    """Top-h looks at the first 100 tokens and drops the others."""
    REPEAT_TEXT = 64
    """The repetition penalty looks at the text alone, not at its prompt."""


NEEDS = (
    "logprob",
    "raw_logprob",
    "temperature_logprob",
    "rank",
    "kept",
    "kept_mass",
    "entropy",
    "temperature_entropy",
)
STAGES = 16  # places of a program; the last stays 0
LISTS = ("bias", "allowed", "banned", "stop", "breaker")
"""The lists of token ids that a row may have; all lie in one flat array, sorted within a list."""

ROW = np.dtype(
    [
        ("stages", "u1", STAGES),
        ("temperature", "<f8"),
        ("dynatemp_range", "<f8"),
        ("dynatemp_exponent", "<f8"),
        ("top_n_sigma", "<f8"),
        ("top_p", "<f8"),
        ("log_min_p", "<f8"),
        ("top_h", "<f8"),
        ("typical_p", "<f8"),
        ("log_epsilon", "<f8"),
        ("log_eta", "<f8"),
        ("xtc_probability", "<f8"),
        ("log_xtc_threshold", "<f8"),
        ("mirostat_tau", "<f8"),
        ("mirostat_eta", "<f8"),
        ("dry_multiplier", "<f8"),
        ("dry_base", "<f8"),
        ("top_k", "<i8"),
        ("penalty_range", "<i8"),  # 0 looks at the whole history
        ("ngram", "<i8"),  # 0 is off
        ("dry_allowed", "<i8"),
        ("dry_range", "<i8"),
        ("min_tokens", "<i8"),
        *((f"{name}_{end}", "<i8") for name in LISTS for end in ("begin", "end")),
        ("penalty", "<f8"),  # 1 is off
        ("presence", "<f8"),  # 0 is off
        ("frequency", "<f8"),  # 0 is off
        ("rules", "<i8"),
    ]
)


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of R rows, or of one that stands for all rows, packed for the kernels.

    `rows` is a structured array of `ROW`. ``ids`` holds every list of every row, ``values`` the number that
    a bias adds to the id at the same place (0 for the other lists). `moves` says which rows have a state.
    """

    rows: npt.NDArray[Any]
    ids: npt.NDArray[np.int64]
    values: npt.NDArray[np.float64]
    highest_id: int
    reads_history: bool
    reads_prompts: bool
    has_state: bool
    moves: npt.NDArray[np.bool_]
    pointers: tuple[int, int, int]

    @classmethod
    def pack(cls, rows: Sequence[Mapping[str, Any]]) -> Settings:
        """Pack one mapping a row: names of `ROW` to numbers, names of `LISTS` to ids, or pairs for a bias."""
        table = np.zeros(len(rows), ROW)
        table["penalty"] = 1
        ids: list[int] = []
        values: list[float] = []
        for place, row in zip(table, rows, strict=True):
            for name, value in row.items():
                if name == "stages":
                    place["stages"][: len(value)] = value
                elif name in LISTS:
                    place[f"{name}_begin"] = len(ids)
                    ids += [i for i, _ in value] if name == "bias" else value
                    values += [v for _, v in value] if name == "bias" else [0.0] * len(value)
                    place[f"{name}_end"] = len(ids)
                else:
                    place[name] = value
        flat = np.array(ids, np.int64)
        numbers = np.array(values, np.float64)
        with np.errstate(over="ignore"):  # -1e300 bans like -inf, whatever the type of the logits
            numbers = np.where(np.isinf(numbers.astype(np.float32)), np.copysign(np.inf, numbers), numbers)
        counts = (table["presence"] != 0) | (table["frequency"] != 0)
        generated = (counts & ((table["rules"] & int(Rule.COUNT_PROMPT)) == 0)) | (table["min_tokens"] > 0)
        generated |= (table["penalty"] != 1) & ((table["rules"] & int(Rule.REPEAT_TEXT)) != 0)
        repeats = (table["penalty"] != 1) | (table["ngram"] > 0) | (table["dry_multiplier"] > 0)
        moves = (table["stages"] == Stage.MIROSTAT).any(axis=1)
        return cls(
            table,
            flat,
            numbers,
            int(flat.max()) if flat.size else -1,
            bool((repeats | counts | generated).any()),
            bool(generated.any()),
            bool(moves.any()),
            moves,
            (table.ctypes.data, flat.ctypes.data, numbers.ctypes.data),
        )

    def row(self, i: int) -> Any:
        """The settings of row `i`."""
        return self.rows[i if len(self.rows) > 1 else 0]

    def list_of(self, row: Any, name: str) -> npt.NDArray[np.int64]:
        """The ids of one list of one row."""
        return self.ids[int(row[f"{name}_begin"]) : int(row[f"{name}_end"])]


# The next two are made at every call, and a frozen one costs as much again as all else of its making.
@dataclass(slots=True)
class Past:
    """What the rows have seen: row i has ``ids[offsets[i]:offsets[i + 1]]``, int64, the prompt first.

    `prompts` holds how many of them are the prompt, or is None where no stage asks.
    """

    ids: Tensor
    offsets: Tensor
    prompts: Tensor | None


@dataclass(slots=True)
class Draw:
    """Where the noise of R rows stands: int64 bits of keys, and coordinates, a row each or one for all."""

    keys: Tensor
    position: int | Tensor
    completion: int | Tensor


@dataclass(slots=True, eq=False)
class Sampled:
    """What is returned for R rows; a field that was not asked for is None.

    Attributes
    ----------
    tokens : (R,) int64 tensor
        The token of each row; -1 where `status` is not OK.
    status : (R,) int32 tensor
        `Status`: 0 OK, 1 NAN, 2 INFINITE (+inf among the logits), 3 EMPTY (nothing left to draw).
    seeds : tuple of int
        The seed of each row, given or made; with it the row can be had again. (Empty from the kernels, which
        know keys.)
    logprob : (R,) float64 tensor, nats
        Log-probability of the token after the whole chain.
    raw_logprob : (R,) float64 tensor, nats
        The model's own: under the softmax of the logits as they came.
    temperature_logprob : (R,) float64 tensor, nats
        After edits and temperature, before any filter.
    rank : (R,) int64 tensor
        Tokens that stand before it in the rank order (logit after the edits, then id): 0 is the most
        probable.
    kept : (offsets, ids)
        Row i kept ``ids[offsets[i]:offsets[i + 1]]``, in rank order.
    kept_mass : (R,) float64 tensor
        What the filters left of the distribution after temperature, in (0, 1].
    entropy : (R,) float64 tensor, nats
        Of the final distribution, from which the token was drawn.
    temperature_entropy : (R,) float64 tensor, nats
        After edits and temperature, before any filter.
    state : (R,) float64 tensor, bits
        Mirostat's mu after the draw, to be given back at the next position; NaN in a row without mirostat,
        None where no row has it.
    """

    tokens: Tensor
    status: Tensor
    seeds: tuple[int, ...] = ()
    logprob: Tensor | None = None
    raw_logprob: Tensor | None = None
    temperature_logprob: Tensor | None = None
    rank: Tensor | None = None
    kept: tuple[Tensor, Tensor] | None = None
    kept_mass: Tensor | None = None
    entropy: Tensor | None = None
    temperature_entropy: Tensor | None = None
    state: Tensor | None = None

    if not TYPE_CHECKING:  # for which any name would be an attribute

        def __getattr__(self, name: str) -> Tensor:
            # Called for what is not set. A status that nobody has set is that of rows that are all OK; it is
            # made when somebody reads it, because making a tensor takes a tenth of a call.
            if name != "status":
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            self.status = self.tokens.new_zeros(len(self.tokens), dtype=torch.int32)
            return self.status

    def __repr__(self) -> str:
        return told(self)


def told(result: Any) -> str:
    """What a dataclass of results has, as text; of many seeds the first and last, as torch prints tensors."""
    parts = []
    for field in fields(result):
        value = getattr(result, field.name)
        if field.name == "seeds" and len(value) > 2 * _EDGE + 2:
            ends = [*map(str, value[:_EDGE]), "...", *map(str, value[-_EDGE:])]
            parts.append(f"seeds=({', '.join(ends)})")
        elif value is not None:
            parts.append(f"{field.name}={value!r}")
    return f"{type(result).__name__}({', '.join(parts)})"


_EDGE = 3  # seeds of either end
