"""The Triton kernels that choose tokens: survey, weigh, draw. ``sampling_triton`` launches them.

`survey` reads the logits once and leaves the maximum of every block of neighbouring ids, `weigh` reads them
once more where no small top-k spares it and leaves the mass of every block and an upper bound of its scores,
and `draw`, one program a row, works on these and on the few blocks that can matter. A float32 logit becomes
an int32 *key* of the same order, so that cuts are found by bisection over integers. What a row keeps is a
prefix of the rank order (key, larger first; then id), given by the key and the id of its last token. Top-p
needs no cut: a token that is drawn stays if the mass before it is short of what is needed, and else the
prefix ends before it and the row draws again. All that decides is float64 in a stated order, or an integer
sum; every launch says ``enable_fp_fusion=False``.

Letters: V vocabulary, T temperature; z, w and S as in ``sampling_reference``; g Gumbel noise.
"""

from __future__ import annotations

import triton
import triton.language as tl

from twodice.kernels.noise_triton import gumbel, lane, weights
from twodice.kernels.philox_triton import philox, widen
from twodice.kernels.sampling_settings import Status
from twodice.random import noise

# Columns of a row's plan; floats are held by their bits.
KEY, POSITION, COMPLETION, FLAGS, TOP_K, TEMPERATURE, MIN_T, LOG_MIN_P, TOP_P_T, TOP_P = range(10)
COLUMNS = 10
# Flags of a row. EARLY: no top-p before the stage, so that nobody counts what it removes.
GREEDY, K_EARLY, MIN_P_EARLY, WITH_P, WEIGHED = (1 << i for i in range(5))

_KEY, _POSITION, _COMPLETION, _FLAGS, _TOP_K = (tl.constexpr(i) for i in range(5))
_TEMPERATURE, _MIN_T, _LOG_MIN_P, _TOP_P_T, _TOP_P = (tl.constexpr(i) for i in range(5, 10))
_COLUMNS = tl.constexpr(COLUMNS)
_GREEDY, _K_EARLY, _MIN_P_EARLY, _WITH_P, _WEIGHED = (tl.constexpr(1 << i) for i in range(5))
_LOWEST = tl.constexpr(-(1 << 31))  # the key of a place beyond the row
_NAN_KEY = tl.constexpr((1 << 31) - 1)
_INFINITE_KEY = tl.constexpr(0x7F800000)
_BANNED_KEY = tl.constexpr(-0x7F800001)  # of -inf
_OK, _NAN = tl.constexpr(int(Status.OK)), tl.constexpr(int(Status.NAN))
_INFINITE, _EMPTY = tl.constexpr(int(Status.INFINITE)), tl.constexpr(int(Status.EMPTY))
_TOKEN = tl.constexpr(noise.PURPOSE_TOKEN)
# The top scores at least -3.8 and noise is at most 45.1: a token with a smaller z is never drawn, and with
# z < -30 its mass is 0.
_REACH = tl.constexpr(-64.0)
_MOST_NOISE = tl.constexpr(46.0)
_SLACK = tl.constexpr(1e-3)  # of bounds in float32, whose errors stay below 1e-4


@triton.jit
def _key_of(value):
    """Return float32 as int32 of the same order; -0 is 0, NaN the highest."""
    bits = value.to(tl.int32, bitcast=True)
    bits = tl.where(bits == _LOWEST, 0, bits)
    return tl.where(value != value, _NAN_KEY, bits ^ ((bits >> 31) & _NAN_KEY))


@triton.jit
def _value_of(key):
    """Return the logit of a key as float64."""
    return (key ^ ((key >> 31) & _NAN_KEY)).to(tl.float32, bitcast=True).to(tl.float64)


@triton.jit
def _keys(at, column_stride, ids, here, BY_BITS: tl.constexpr):
    value = tl.load(at + ids.to(tl.int64) * column_stride, mask=here, other=0.0)
    return tl.where(here, _key_of(widen(value, BY_BITS)), _LOWEST)


@triton.jit
def _float(plan, COLUMN: tl.constexpr):
    return tl.load(plan + COLUMN).to(tl.float64, bitcast=True)


@triton.jit
def _words(plan):
    """Return position, completion and the two words of the key, as uint32."""
    key = tl.load(plan + _KEY)
    position, completion = tl.load(plan + _POSITION), tl.load(plan + _COMPLETION)
    low, high = (key & 0xFFFFFFFF).to(tl.uint32), ((key >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return position.to(tl.uint32), completion.to(tl.uint32), low, high


@triton.jit
def survey_kernel(
    x, row_stride, column_stride, V, maxima, tops,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, BY_BITS: tl.constexpr,
):  # fmt: skip
    """The greatest key of every block and, into `tops` (filled with the lowest), of every row."""
    row = tl.program_id(0).to(tl.int64)
    count = tl.cdiv(V, BLOCK)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    ids = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    best = tl.max(_keys(x + row * row_stride, column_stride, ids, ids < V, BY_BITS), 1)
    tl.store(maxima + row * count + block, best, mask=block < count)
    tl.atomic_max(tops + row, tl.max(best, 0))


@triton.jit
def weigh_kernel(
    x, row_stride, column_stride, V, plans, tops, bounds, masses,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, BY_BITS: tl.constexpr,
):  # fmt: skip
    """Of every block a bound of its scores from 16 bits of noise, and for top-p its mass."""
    row = tl.program_id(0).to(tl.int64)
    plan = plans + row * _COLUMNS
    flags, top_key = tl.load(plan + _FLAGS), tl.load(tops + row)
    if ((flags & _WEIGHED) != 0) & (top_key > _BANNED_KEY) & (top_key < _INFINITE_KEY):
        count = tl.cdiv(V, BLOCK)
        block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
        group = block[:, None] * (BLOCK // 8) + tl.arange(0, BLOCK // 8)[None, :]
        eight = tl.arange(0, 8)
        ids = group[:, :, None] * 8 + eight[None, None, :]
        key = _keys(x + row * row_stride, column_stride, ids, ids < V, BY_BITS)
        alive = key > _BANNED_KEY
        top = _value_of(top_key)
        below_top = tl.where(alive, _value_of(key), top) - top
        position, completion, k0, k1 = _words(plan)
        w0, w1, w2, w3 = philox(group.to(tl.uint32), position, completion, _TOKEN, k0, k1)
        which = eight.to(tl.uint32)[None, None, :]
        high = lane(which, w0[:, :, None], w1[:, :, None], w2[:, :, None], w3[:, :, None])
        # g = -log(E), and E >= w for the uniform w, of which high / 2^16 is the floor. A higher temperature
        # has higher scores, so what keeps the reciprocal from overflowing leaves this a bound.
        most = tl.where(high == 0, _MOST_NOISE, -tl.log(high.to(tl.float32) * (2.0**-16)))
        z = below_top * (1.0 / tl.maximum(_float(plan, _TEMPERATURE), 1e-300))
        reached = alive & (z >= _REACH)
        bound = tl.where(reached, tl.where(reached, z, 0.0).to(tl.float32) + most + _SLACK, -float("inf"))
        at = row * count + block
        tl.store(bounds + at, tl.max(tl.max(bound, 2), 1), mask=block < count)
        if (flags & _WITH_P) != 0:
            mass = weights(below_top / _float(plan, _TOP_P_T))
            mass = tl.where(alive, mass, 0)
            tl.store(masses + at, tl.sum(tl.sum(mass, 2), 1), mask=block < count)


@triton.jit
def _tile(
    at, column_stride, V, pool, count, i, WIDTH: tl.constexpr, TILE: tl.constexpr, BY_BITS: tl.constexpr
):
    """Return ids and keys of the i-th tile of a pool: of `count` ids (WIDTH 1), or of blocks of WIDTH ids."""
    place = i * (TILE // WIDTH) + tl.arange(0, TILE // WIDTH)
    unit = tl.load(pool + place, mask=place < count, other=0)
    ids = unit[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    here = (place < count)[:, None] & (ids < V)
    return ids, _keys(at, column_stride, ids, here, BY_BITS)


@triton.jit
def _count(
    at, column_stride, V, pool, count, key, last,
    WIDTH: tl.constexpr, TILE: tl.constexpr, BY_BITS: tl.constexpr,
):  # fmt: skip
    """How many tokens of the pool stand at or before the token (key, last)."""
    found = tl.sum(tl.zeros((1,), tl.int32), 0)
    for i in range(0, tl.cdiv(count, TILE // WIDTH)):
        ids, keys = _tile(at, column_stride, V, pool, count, i, WIDTH, TILE, BY_BITS)
        found += tl.sum(((keys > key) | ((keys == key) & (ids <= last))).to(tl.int32))
    return found


@triton.jit
def _mass(
    at, column_stride, V, pool, count, key, last, top, temperature, least, min_t,
    WIDTH: tl.constexpr, TILE: tl.constexpr, BY_BITS: tl.constexpr,
):  # fmt: skip
    """The mass of the tokens at or before (key, last) whose z at `min_t` is at least `least`."""
    found = tl.sum(tl.zeros((1,), tl.int64), 0)
    for i in range(0, tl.cdiv(count, TILE // WIDTH)):
        ids, keys = _tile(at, column_stride, V, pool, count, i, WIDTH, TILE, BY_BITS)
        kept = ((keys > key) | ((keys == key) & (ids <= last))) & (keys > _BANNED_KEY)
        below_top = tl.where(kept, _value_of(keys), top) - top
        kept = kept & (below_top / min_t >= least)
        found += tl.sum(tl.where(kept, weights(below_top / temperature), 0))
    return found


@triton.jit
def _cut(
    at, column_stride, V, pool, count, low, high, k,
    WIDTH: tl.constexpr, TILE: tl.constexpr, BY_BITS: tl.constexpr,
):  # fmt: skip
    """The k-th token of the pool as (key, id); of a pool of fewer the lowest key in reach, and V."""
    low = tl.maximum(low, _BANNED_KEY)
    found = _count(at, column_stride, V, pool, count, low, V, WIDTH, TILE, BY_BITS)
    last = found * 0 + V
    if found > k:
        while (low < high) & (found != k):
            middle = ((low.to(tl.int64) + high.to(tl.int64) + 1) >> 1).to(tl.int32)
            enough = _count(at, column_stride, V, pool, count, middle, V, WIDTH, TILE, BY_BITS)
            if enough >= k:
                low = middle
                found = enough
            else:
                high = middle - 1
        if found > k:  # ties stand on both sides of the cut: the lower ids stay
            first = tl.sum(tl.zeros((1,), tl.int32), 0) - 1
            while first + 1 < last:
                half = (first + last) >> 1
                if _count(at, column_stride, V, pool, count, low, half, WIDTH, TILE, BY_BITS) >= k:
                    last = half
                else:
                    first = half
    return low, last


@triton.jit
def _best(
    ids, keys, key, last, top, temperature, least, min_t, position, completion, k0, k1, best, drawn, V,
):  # fmt: skip
    """The greatest score of a tile's tokens at or before (key, last), or `best` if that is greater."""
    kept = ((keys > key) | ((keys == key) & (ids <= last))) & (keys > _BANNED_KEY)
    below_top = tl.where(kept, _value_of(keys), top) - top
    kept = kept & (below_top / min_t >= least)
    score = below_top / temperature + gumbel(ids.to(tl.uint32), position, completion, _TOKEN, k0, k1)
    score = tl.where(kept, score, -float("inf"))
    most = tl.max(score)
    first = tl.min(tl.where(kept & (score == most), ids, V))
    drawn = tl.where(most > best, first, tl.where(most == best, tl.minimum(first, drawn), drawn))
    return tl.maximum(best, most), drawn


@triton.jit
def _reaches(key, top, temperature, p_temperature, early, min_t):
    """Whether a token may be drawn, or has a mass that top-p counts: true for a prefix of the rank order."""
    below_top = _value_of(key) - top
    reached = (below_top / temperature >= _REACH) | (below_top / p_temperature >= _REACH)
    return (key > _BANNED_KEY) & reached & (below_top / min_t >= early)


@triton.jit
def _gather(pool, block, use):
    """Write the blocks that are in use, one behind the other, for all threads of the program."""
    tl.debug_barrier()
    tl.store(pool + tl.cumsum(use.to(tl.int32), 0) - 1, block, mask=use)
    tl.debug_barrier()
    return tl.sum(use.to(tl.int32), 0)


@triton.jit
def draw_kernel(
    x, row_stride, column_stride, V, plans, maxima, tops, bounds, masses, pools, lists, tokens, states, ranks,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, TILE: tl.constexpr, ROOM: tl.constexpr, BY_BITS: tl.constexpr,
):  # fmt: skip
    """The token of each row, its status and, if asked for, its rank; `lists` has room for ROOM ids a row."""
    row = tl.program_id(0).to(tl.int64)
    at, plan = x + row * row_stride, plans + row * _COLUMNS
    blocks = tl.cdiv(V, BLOCK)
    pool, ids_of_list = pools + row * blocks, lists + row * ROOM
    top_key, flags, k = tl.load(tops + row), tl.load(plan + _FLAGS), tl.load(plan + _TOP_K).to(tl.int32)
    state = tl.where(top_key <= _BANNED_KEY, _EMPTY, _OK)
    state = tl.where(top_key == _INFINITE_KEY, _INFINITE, tl.where(top_key > _INFINITE_KEY, _NAN, state))
    tl.store(states + row, state)
    if state != _OK:
        tl.store(tokens + row, -1)
        if ranks is not None:
            tl.store(ranks + row, -1)
        return
    block = tl.arange(0, BLOCKS)
    best_key = tl.load(maxima + row * blocks + block, mask=block < blocks, other=_LOWEST)
    if (flags & _GREEDY) != 0:
        ids = tl.min(tl.where(best_key == top_key, block, BLOCKS), 0) * BLOCK + tl.arange(0, BLOCK)
        keys = _keys(at, column_stride, ids, ids < V, BY_BITS)
        tl.store(tokens + row, tl.min(tl.where(keys == top_key, ids, V), 0))
        if ranks is not None:
            tl.store(ranks + row, 0)
        return

    top = _value_of(top_key)
    temperature, min_t = _float(plan, _TEMPERATURE), _float(plan, _MIN_T)
    least, p_temperature = _float(plan, _LOG_MIN_P), _float(plan, _TOP_P_T)
    with_p, weighed = (flags & _WITH_P) != 0, (flags & _WEIGHED) != 0
    k_early, k_late = (flags & _K_EARLY) != 0, (flags & _K_EARLY) == 0
    min_p_early, min_p_late = (flags & _MIN_P_EARLY) != 0, (flags & _MIN_P_EARLY) == 0
    position, completion, k0, k1 = _words(plan)
    nothing = tl.sum(tl.zeros((1,), tl.int32), 0)
    end = nothing + V

    # What can matter. The k-th greatest maximum of the blocks is at most the k-th greatest key.
    early = tl.where(min_p_early, least, -float("inf"))
    use = _reaches(best_key, top, temperature, p_temperature, early, min_t)
    floor = nothing + _LOWEST
    listed = nothing + ROOM + 1
    if (k > 0) & (k <= blocks):
        high = top_key
        while floor < high:
            middle = ((floor.to(tl.int64) + high.to(tl.int64) + 1) >> 1).to(tl.int32)
            if tl.sum((best_key >= middle).to(tl.int32), 0) >= k:
                floor = middle
            else:
                high = middle - 1
    if k_early & (k <= blocks):
        use = use & (best_key >= floor)
        count = _gather(pool, block, use)
        listed = nothing
        for i in range(0, tl.cdiv(count, TILE // BLOCK)):
            ids, keys = _tile(at, column_stride, V, pool, count, i, BLOCK, TILE, BY_BITS)
            ids, keys = tl.reshape(ids, (TILE,)), tl.reshape(keys, (TILE,))
            taken = keys >= floor
            place = listed + tl.cumsum(taken.to(tl.int32), 0) - 1
            tl.store(ids_of_list + place, ids, mask=taken & (place < ROOM))
            listed += tl.sum(taken.to(tl.int32), 0)
        tl.debug_barrier()

    # The cut of what is kept: tokens at or before (key, last).
    key, last = nothing + _LOWEST, end
    need = tl.sum(tl.zeros((1,), tl.int64), 0)
    done = nothing
    drawn = end
    before = nothing
    if listed <= ROOM:
        key, last = _cut(at, column_stride, V, ids_of_list, listed, floor, top_key, k, 1, TILE, BY_BITS)
        if with_p:
            total = _mass(at, column_stride, V, ids_of_list, listed, key, last, top, p_temperature, early,
                          min_t, 1, TILE, BY_BITS)  # fmt: skip
            need = _need(plan, total)
        while done == 0:
            best = nothing.to(tl.float64) - float("inf")
            drawn = end
            for i in range(0, tl.cdiv(listed, TILE)):
                ids, keys = _tile(at, column_stride, V, ids_of_list, listed, i, 1, TILE, BY_BITS)
                best, drawn = _best(ids, keys, key, last, top, temperature, least, min_t, position,
                                    completion, k0, k1, best, drawn, V)  # fmt: skip
            key = _keys(at, column_stride, drawn, drawn < V, BY_BITS)
            last = drawn - 1
            done = nothing + 1
            if with_p:
                mass = _mass(at, column_stride, V, ids_of_list, listed, key, last, top, p_temperature,
                             -float("inf"), min_t, 1, TILE, BY_BITS)  # fmt: skip
                done = (mass < need).to(tl.int32)
        if ranks is not None:
            before = _count(at, column_stride, V, ids_of_list, listed, key, last, 1, TILE, BY_BITS)
    else:
        if k_early:
            count = _gather(pool, block, use)
            key, last = _cut(at, column_stride, V, pool, count, floor, top_key, k, BLOCK, TILE, BY_BITS)
        if with_p:
            if weighed & k_late & min_p_late:
                own = tl.load(masses + row * blocks + block, mask=block < blocks, other=0)
                need = _need(plan, tl.sum(own, 0))
            else:
                count = _gather(pool, block, use & (best_key >= key))
                total = _mass(at, column_stride, V, pool, count, key, last, top, p_temperature, early, min_t,
                              BLOCK, TILE, BY_BITS)  # fmt: skip
                need = _need(plan, total)
        if (k > 0) & k_late:
            count = _gather(pool, block, use)
            key, last = _cut(at, column_stride, V, pool, count, floor, top_key, k, BLOCK, TILE, BY_BITS)
        bound = ((tl.where(use, _value_of(best_key), top) - top) / temperature).to(tl.float32) + _MOST_NOISE
        if weighed:
            bound = tl.load(bounds + row * blocks + block, mask=block < blocks, other=0.0)
        while done == 0:
            # The block with the greatest bound first, until no bound reaches the best score.
            best = nothing.to(tl.float64) - float("inf")
            drawn = end
            open_bound = tl.where(use & (best_key >= key), bound, -float("inf"))
            most = tl.max(open_bound, 0)
            while (most > -float("inf")) & (most.to(tl.float64) >= best):
                which = tl.min(tl.where(open_bound == most, block, BLOCKS), 0)
                ids = which * BLOCK + tl.arange(0, BLOCK)
                keys = _keys(at, column_stride, ids, ids < V, BY_BITS)
                best, drawn = _best(ids, keys, key, last, top, temperature, least, min_t, position,
                                    completion, k0, k1, best, drawn, V)  # fmt: skip
                open_bound = tl.where(block == which, -float("inf"), open_bound)
                most = tl.max(open_bound, 0)
            key = _keys(at, column_stride, drawn, drawn < V, BY_BITS)
            last = drawn - 1
            done = nothing + 1
            if with_p:
                count = _gather(pool, block, use & (best_key >= key))
                mass = _mass(at, column_stride, V, pool, count, key, last, top, p_temperature, -float("inf"),
                             min_t, BLOCK, TILE, BY_BITS)  # fmt: skip
                done = (mass < need).to(tl.int32)
        if ranks is not None:
            count = _gather(pool, block, use & (best_key >= key))
            before = _count(at, column_stride, V, pool, count, key, last, BLOCK, TILE, BY_BITS)
    tl.store(tokens + row, drawn)
    if ranks is not None:
        tl.store(ranks + row, before)


@triton.jit
def _need(plan, total):
    """The mass that a prefix must reach: ``ceil(p S)``, at least 1 and at most S."""
    wanted = tl.ceil(_float(plan, _TOP_P) * total.to(tl.float64)).to(tl.int64)
    return tl.minimum(tl.maximum(wanted, 1), total)
