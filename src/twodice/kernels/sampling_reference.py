"""The chain in plain torch: the oracle of every sampling kernel, and what runs where there is none.

A row's tokens are put in *rank order* (the logit after the edits, larger first; among equals the lower id
first). Every stage keeps a contiguous range of it, so what a row has kept is two numbers, ``begin`` and
``end``; the draw, the masses and the entropies follow from them. All that decides is a float64 operation of a
stated order, or a sum of integers, which has none. Edits of single logits are in
``twodice.kernels.sampling_edit``.

Letters: R rows, V vocabulary; r rows that run the same stage. z = (logit - first kept logit) / temperature,
w = round(exp(z) 2^42) the mass of a token, S the sum of the masses that are kept, so that the probability of
a token is exp(z - log(S 2^-42)).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from twodice.kernels.sampling_edit import bad_rows, edit
from twodice.kernels.sampling_settings import Past, Rule, Sampled, Settings, Stage, Status
from twodice.random import noise

UNIT = float(1 << noise.WEIGHT_BITS)
SIGMA_UNIT = float(1 << 20)
"""Fixed-point digits of a logit's distance to the top in top-n-sigma."""
SIGMA_LOW = -1024.0
"""Distances beyond this one count as this one: a token that far away is no part of the logits' noise."""


@dataclass
class _Rows:
    """r rows at one stage; every field is (r, V) or (r, 1), and `begin`, `end`, ... are written by stages."""

    ordered: Tensor  # float64 logits in rank order
    begin: Tensor
    end: Tensor
    temperature: Tensor  # 0 once the row is greedy: one token is kept, and nothing is drawn
    alive: Tensor  # tokens that the edits left
    dropped: (
        Tensor  # the first `dropped` of the range pay `shift`, the others get `rest` (XTC by expectation)
    )
    shift: Tensor
    rest: Tensor
    state: Tensor

    @property
    def place(self) -> Tensor:
        return torch.arange(self.ordered.shape[1], device=self.ordered.device)[None]

    @property
    def kept(self) -> Tensor:
        return (self.place >= self.begin) & (self.place < self.end)

    def z(self, all_alive: bool = False) -> Tensor:
        """z of what is kept (or of all that lives), -inf elsewhere."""
        first = self.ordered.gather(1, torch.zeros_like(self.begin) if all_alive else self.begin)
        kept = self.place < self.alive if all_alive else self.kept
        temperature = torch.where(self.temperature == 0, 1.0, self.temperature)
        return torch.where(kept, (self.ordered - first) / temperature, -torch.inf)

    def keep_first(self, count: Tensor) -> None:
        """Keep the first `count` (r, 1) of the range, and at least one."""
        self.end = torch.minimum(self.end, self.begin + count.clamp(min=1))


def _column(rows: Any, name: str, like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(rows[name])).to(like.device)[:, None]


def _count(mask: Tensor) -> Tensor:
    return mask.sum(1, keepdim=True)


def _log_total(mass: Tensor) -> Tensor:
    """log(S 2^-42) of (r, V) masses."""
    return noise.log(mass.sum(1, keepdim=True).to(torch.float64) * (1.0 / UNIT))


def _moments(z: Tensor) -> tuple[Tensor, Tensor]:
    """The masses w and the integers ``round(exp(z) (-z) 2^42)``, which is 0 where w is."""
    w = noise.weights(z)
    steep = torch.where(w > 0, noise.exp(z) * -torch.where(w > 0, z, 0.0), 0.0)
    return w, torch.round(steep * UNIT).to(torch.int64)


def _entropy(z: Tensor) -> tuple[Tensor, Tensor]:
    """(log S, H): the entropy in nats is log S + M / S, M the sum of the moments."""
    w, m = _moments(z)
    log_total = _log_total(w)
    total = w.sum(1, keepdim=True).to(torch.float64)
    return log_total, log_total + m.sum(1, keepdim=True).to(torch.float64) / total


def _need(p: Tensor, total: Tensor) -> Tensor:
    wanted = torch.ceil(p * total.to(torch.float64)).to(torch.int64).clamp(min=1)
    return torch.minimum(wanted, total)


def _temperature(at: _Rows, row: Any) -> None:
    at.temperature = _column(row, "temperature", at.ordered).clone()


def _greedy(at: _Rows, row: Any) -> None:
    """The lowest id among the first of the range: the last of its ties where higher ids stand first."""
    if bool((row["rules"] & int(Rule.HIGH_ID_FIRST)).any()):
        high = (_column(row, "rules", at.ordered) & int(Rule.HIGH_ID_FIRST)) != 0
        ties = _count(at.kept & (at.ordered == at.ordered.gather(1, at.begin)))
        at.begin = torch.where(high, at.begin + ties - 1, at.begin)
    at.end = at.begin + 1
    at.temperature = torch.zeros_like(at.temperature)


def dynamic_temperature(
    middle: Tensor, spread: Tensor, exponent: Tensor, n: Tensor, entropy: Tensor
) -> Tensor:
    """T = low + (high - low) (H / log n)^exponent for n tokens of this entropy [nats]; `middle` for one."""
    low, high = (middle - spread).clamp(min=0.0), middle + spread
    share = (entropy / noise.log(n.clamp(min=2.0))).clamp(0.0, 1.0)
    tiny = 2.0**-1022  # log is defined on normal numbers
    power = torch.where(share >= tiny, noise.exp(exponent * noise.log(share.clamp(min=tiny))), 0.0)
    power = torch.where(exponent == 0, 1.0, power)
    return torch.where(n > 1, low + (high - low) * power, middle)


def _dynatemp(at: _Rows, row: Any) -> None:
    """The dynamic temperature of the tokens that are kept; T = 0 keeps the first."""
    middle, spread, exponent = (
        _column(row, name, at.ordered) for name in ("temperature", "dynatemp_range", "dynatemp_exponent")
    )
    n = (at.end - at.begin).to(torch.float64)
    found = dynamic_temperature(middle, spread, exponent, n, _entropy(at.z())[1])
    at.end = torch.where(found == 0, at.begin + 1, at.end)
    at.temperature = found


def _top_n_sigma(at: _Rows, row: Any) -> None:
    """Keep z T >= -n sigma, sigma the population deviation of the logits that are kept."""
    first = at.ordered.gather(1, at.begin)
    u = torch.where(at.kept, (at.ordered - first).clamp(min=SIGMA_LOW), 0.0)
    q = torch.round(u * SIGMA_UNIT).to(torch.int64)
    square = q * q
    n = (at.end - at.begin).to(torch.float64)
    mean = q.sum(1, keepdim=True).to(torch.float64) / n
    high = (square >> 32).sum(1, keepdim=True).to(torch.float64)
    low = (square & 0xFFFFFFFF).sum(1, keepdim=True).to(torch.float64)
    variance = ((high * 4294967296.0 + low) / n - mean * mean).clamp(min=0.0)
    n_sigma, distance = _column(row, "top_n_sigma", at.ordered), at.ordered - first
    # Squares, since torch's square root is not everywhere the correctly rounded one.
    limit = (n_sigma * n_sigma) * variance / (SIGMA_UNIT * SIGMA_UNIT)
    at.keep_first(_count(at.kept & (distance * distance <= limit)))


def _top_k(at: _Rows, row: Any) -> None:
    k = torch.minimum(_column(row, "top_k", at.ordered), at.end - at.begin)
    ties = (_column(row, "rules", at.ordered) & int(Rule.TIES_AT_K)) != 0
    last = at.ordered.gather(1, at.begin + k - 1)
    at.keep_first(torch.where(ties, _count(at.kept & (at.ordered >= last)), k))


def _top_p(at: _Rows, row: Any) -> None:
    joint = (_column(row, "rules", at.ordered) & int(Rule.JOINT)) != 0
    mass = torch.where(joint, noise.weights(at.z(all_alive=True)), noise.weights(at.z()))
    need = _need(_column(row, "top_p", at.ordered), mass.sum(1, keepdim=True))
    before = mass.cumsum(1) - mass
    at.keep_first(_count(at.kept & torch.where(joint, before <= need, before < need)))


def _min_p(at: _Rows, row: Any) -> None:
    at.keep_first(_count(at.z() >= _column(row, "log_min_p", at.ordered)))


def _top_h(at: _Rows, row: Any) -> None:
    """The longest prefix, of tokens with a mass, whose part of the entropy is at most `top_h` of it."""
    few = (_column(row, "rules", at.ordered) & int(Rule.TOP_H_OF_100)) != 0
    at.end = torch.where(few, torch.minimum(at.end, at.begin + 100), at.end)
    w, m = _moments(at.z())
    log_total = _log_total(w)

    def part(mass: Tensor, moment: Tensor) -> Tensor:
        return mass.to(torch.float64) * log_total + moment.to(torch.float64)

    most = _column(row, "top_h", at.ordered) * part(w.sum(1, keepdim=True), m.sum(1, keepdim=True))
    at.keep_first(_count((w > 0) & (part(w.cumsum(1), m.cumsum(1)) <= most)))


def _typical(at: _Rows, row: Any) -> None:
    """By distance of -log p to the entropy: the shortest run whose mass reaches `typical_p`, ties included.

    -log p grows along the rank order, so the run is a range of it.
    """
    z = at.z()
    w = noise.weights(z)
    log_total, entropy = _entropy(z)
    distance = torch.where(at.kept, ((log_total - z) - entropy).abs(), torch.inf)
    near, order = torch.sort(distance, dim=1, stable=True)
    mass = w.gather(1, order)
    need = _need(_column(row, "typical_p", at.ordered), mass.sum(1, keepdim=True))
    last = near.gather(1, _count((mass.cumsum(1) - mass) < need) - 1)
    taken = at.kept & (distance <= last)
    at.begin = torch.where(taken, at.place, taken.shape[1]).min(1, keepdim=True).values
    at.end = torch.where(taken, at.place, -1).max(1, keepdim=True).values + 1


def _least(at: _Rows, row: Any, log_least: Tensor, z: Tensor, log_total: Tensor) -> None:
    ties = (_column(row, "rules", at.ordered) & int(Rule.TIES_AT_K)) != 0
    log_least = torch.where(ties, torch.minimum(log_least, -log_total), log_least)  # z of the first is 0
    at.keep_first(_count(at.kept & (z - log_total >= log_least)))


def _epsilon(at: _Rows, row: Any) -> None:
    z = at.z()
    _least(at, row, _column(row, "log_epsilon", at.ordered), z, _log_total(noise.weights(z)))


def _eta(at: _Rows, row: Any) -> None:
    z = at.z()
    log_total, entropy = _entropy(z)
    eta = _column(row, "log_eta", at.ordered)
    _least(at, row, torch.minimum(eta, 0.5 * eta - entropy), z, log_total)


def _xtc(at: _Rows, row: Any, coin: Tensor) -> None:
    """Of the tokens with at least the threshold's probability only the last stays, if the coin says so.

    By expectation both outcomes are mixed: a token that would go has the chance that it stays, the others
    take up its mass in the cases where it goes.
    """
    p = _column(row, "xtc_probability", at.ordered)
    z = at.z()
    w = noise.weights(z)
    above = _count(at.kept & (z - _log_total(w) >= _column(row, "log_xtc_threshold", at.ordered)))
    removed = (above - 1).clamp(min=0)
    expected = (_column(row, "rules", at.ordered) & int(Rule.XTC_EXPECTED)) != 0
    gone = torch.where(at.place - at.begin < removed, w, 0).sum(1, keepdim=True).to(torch.float64)
    left = w.sum(1, keepdim=True).to(torch.float64)
    mix = expected & (removed > 0) & (p < 1)
    stays, share = 1.0 - p, p / ((left - gone) / left)
    shift = noise.log(torch.where(mix, stays, 1.0))
    rest = noise.log(torch.where(mix, stays + share, 1.0))
    at.dropped = torch.where(mix, removed, at.dropped)
    at.shift = torch.where(mix, shift, at.shift)
    at.rest = torch.where(mix, rest, at.rest)
    sure = torch.where(expected, p == 1, coin < p)
    at.begin = torch.where(sure, at.begin + removed, at.begin)


def _mirostat(at: _Rows, row: Any) -> None:
    """Keep the tokens whose surprise, -log2 p, is at most the state mu."""
    tau = _column(row, "mirostat_tau", at.ordered)
    at.state = torch.where(at.state.isnan(), 2.0 * tau, at.state)
    z = at.z()
    surprise = (_log_total(noise.weights(z)) - z) * noise.LOG2_E
    at.keep_first(_count(at.kept & (surprise <= at.state)))


_RUN = {
    Stage.TEMPERATURE: _temperature,
    Stage.DYNATEMP: _dynatemp,
    Stage.GREEDY: _greedy,
    Stage.TOP_N_SIGMA: _top_n_sigma,
    Stage.TOP_K: _top_k,
    Stage.TOP_P: _top_p,
    Stage.MIN_P: _min_p,
    Stage.TOP_H: _top_h,
    Stage.TYPICAL: _typical,
    Stage.EPSILON: _epsilon,
    Stage.ETA: _eta,
    Stage.MIROSTAT: _mirostat,
}


def _run(at: _Rows, rows: Any, coin: Tensor) -> None:
    """Run every row's program: at each place of the programs, the rows that have the same stage together."""
    for slot in range(rows["stages"].shape[1]):
        codes = rows["stages"][:, slot]
        for code in np.unique(codes[codes > 0]):
            which = torch.from_numpy(np.flatnonzero(codes == code)).to(at.ordered.device)
            part = _Rows(**{name: getattr(at, name)[which] for name in _Rows.__dataclass_fields__})
            settings = rows[codes == code]
            if code == Stage.XTC:
                _xtc(part, settings, coin[which])
            else:
                _RUN[Stage(code)](part, settings)
            for name in _Rows.__dataclass_fields__:
                if name not in ("ordered", "alive"):
                    getattr(at, name)[which] = getattr(part, name)


def reference(
    logits: Tensor,
    settings: Settings,
    keys: Tensor,
    position: Tensor,
    completion: Tensor,
    past: Past | None = None,
    mask: Tensor | None = None,
    state: Tensor | None = None,
    need: Sequence[str] = (),
) -> Sampled:
    """The chain in plain torch; every backend gives the same tokens, statuses, ranks, kept sets and states.

    Parameters
    ----------
    logits : (R, V) float tensor
        float16, bfloat16 and float32 are taken as float32, float64 stays.
    keys, position, completion : (R,) int64 tensors
    past : Past, optional
    mask : (R, ceil(V / 32)) int32 tensor, optional
    state : (R,) float64 tensor, optional
        Mirostat's mu; NaN, or none at all, starts at twice the target.
    """
    count, vocabulary = logits.shape
    device = logits.device
    raw = logits if logits.dtype == torch.float64 else logits.to(torch.float32)
    rows = settings.rows if len(settings.rows) == count else np.repeat(settings.rows, count)
    # 1: rows that cannot be served
    status = bad_rows(raw)
    # 2, 3: edits
    x = edit(raw, settings, past, mask)
    status = torch.where(status == Status.OK, bad_rows(x), status)  # a bias or a penalty can overflow
    status[(status == Status.OK) & (x == -torch.inf).all(1)] = int(Status.EMPTY)
    ok = status == Status.OK
    x = torch.where(ok[:, None], x, 0.0)

    # The rank order does not depend on the temperature.
    x = x + 0.0  # -0 equals +0
    high_first = torch.from_numpy((rows["rules"] & int(Rule.HIGH_ID_FIRST)) != 0).to(device)[:, None]
    ordered, ids = torch.sort(torch.where(high_first, x.flip(1), x), dim=1, descending=True, stable=True)
    ids = torch.where(high_first, vocabulary - 1 - ids, ids)
    wide = ordered.to(torch.float64)
    # 4 to 10: the program of each row
    column = torch.zeros((count, 1), dtype=torch.int64, device=device)
    number = torch.zeros((count, 1), dtype=torch.float64, device=device)
    alive = _count(wide > -torch.inf)
    start = number + torch.nan if state is None else state.to(device, torch.float64)[:, None].clone()
    at = _Rows(wide, column.clone(), alive.clone(), number + 1.0, alive, column.clone(), number.clone(),
               number.clone(), start.clone())  # fmt: skip
    _run(at, rows, noise.coin(position, completion, noise.PURPOSE_XTC, keys)[:, None])
    # 11: the draw
    z = at.z()
    final = z + torch.where(at.place - at.begin < at.dropped, at.shift, at.rest)
    g = noise.gumbel(ids, position[:, None], completion[:, None], noise.PURPOSE_TOKEN, keys[:, None])
    score = torch.where(at.kept, final + g, -torch.inf)
    best = score.max(1, keepdim=True).values
    tokens = torch.where(at.kept & (score == best), ids, vocabulary).min(1).values
    drawn = (ids == tokens[:, None]).to(torch.int64).argmax(1, keepdim=True)
    out = Sampled(torch.where(ok, tokens, -1), status.to(torch.int32))
    if settings.has_state:
        out.state = torch.where(ok, _next_state(at, rows, final, drawn), start[:, 0])
    _report(out, need, at, ids, drawn, ok, final)
    if "raw_logprob" in need:
        known = raw.to(torch.float64)
        known = known - known.amax(1, keepdim=True)  # or log 2 is lost beside 3e38
        own = known.gather(1, tokens.clamp(0, vocabulary - 1)[:, None])[:, 0]
        out.raw_logprob = torch.where(ok, own - torch.logsumexp(known, 1), torch.nan)
    return out


def _next_state(at: _Rows, rows: Any, final: Tensor, drawn: Tensor) -> Tensor:
    """mu - eta (surprise of the token in the final distribution - tau); rows without mirostat keep theirs."""
    has = torch.from_numpy((rows["stages"] == Stage.MIROSTAT).any(1)).to(final.device)
    surprise = (_log_total(noise.weights(at.z())) - final.gather(1, drawn)) * noise.LOG2_E
    error = surprise - _column(rows, "mirostat_tau", final)
    moved = at.state - _column(rows, "mirostat_eta", final) * error
    return torch.where(has, moved[:, 0], at.state[:, 0])


def _report(
    out: Sampled, need: Sequence[str], at: _Rows, ids: Tensor, drawn: Tensor, ok: Tensor, final: Tensor
) -> None:
    """What was asked for beside the token; float64 sums, in no promised order."""

    def put(values: Tensor) -> Tensor:
        return torch.where(ok, values, torch.nan)

    if "rank" in need:
        out.rank = torch.where(ok, drawn[:, 0], -1)
    if "kept" in need:
        kept = at.kept & ok[:, None]
        offsets = torch.zeros(len(ok) + 1, dtype=torch.int64, device=ok.device)
        offsets[1:] = kept.sum(1).cumsum(0)
        out.kept = (offsets, ids[kept])
    if {"logprob", "entropy"} & set(need):
        e = torch.where(at.kept, torch.exp(final), 0.0)
        total = e.sum(1)
        if "logprob" in need:
            out.logprob = put(final.gather(1, drawn)[:, 0] - total.log())
        if "entropy" in need:
            # H = log S - sum(e z) / S; the term of a token with e = 0 is 0 (its z may be -inf)
            out.entropy = put(total.log() - torch.where(e > 0, e * final, 0.0).sum(1) / total)
    if {"temperature_logprob", "kept_mass", "temperature_entropy"} & set(need):
        warm = at.z(all_alive=True)
        warm = torch.where(at.temperature == 0, torch.where(at.kept, 0.0, -torch.inf), warm)
        e = torch.exp(warm)
        total = e.sum(1)
        if "temperature_logprob" in need:
            out.temperature_logprob = put(warm.gather(1, drawn)[:, 0] - total.log())
        if "kept_mass" in need:
            out.kept_mass = put(torch.where(at.kept, e, 0.0).sum(1) / total)
        if "temperature_entropy" in need:
            out.temperature_entropy = put(total.log() - torch.where(e > 0, e * warm, 0.0).sum(1) / total)
