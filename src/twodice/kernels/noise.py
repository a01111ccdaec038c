"""Every form of noise on a tensor with declared axes: the result, its gradient, and the bare mask.

Bernoulli noise per unit, locked over positions or per block is the kernel of `kernels.dropout` with other
positions and columns; Gaussian noise has a kernel of its own (``native/gaussian.cpp``). A step may be one
number for each row, so that many Monte Carlo draws run in one pass. Compiled code and fake tensors go
through ``torch.ops.twodice.noisy``; under ``torch.func`` and where there is no native kernel the readable
twin in ``noise_reference`` runs. The choice changes speed only. This module knows no rate (only thresholds),
no plan and no model.

Letters: B rows, H heads, T positions, C columns, S keys, N rows of a flattened batch.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch.autograd import forward_ad

from twodice.errors import ConfigError, ContractError, ShapeError
from twodice.kernels import dispatch
from twodice.kernels import dropout as bernoulli
from twodice.kernels.dropout_layout import Coordinates, coordinates, follow, sizes, spread, strides
from twodice.kernels.noise_form import UNIT, Noise
from twodice.kernels.noise_reference import deviation, noise_reference
from twodice.random.draws import ONE, check_bound, check_bounds
from twodice.random.gaussian import COLUMNS
from twodice.random.keys import Key, key_bits

__all__ = ["UNIT", "Noise", "kept", "noisy"]

_native: Any = getattr(dispatch.native, "gaussian", None)
_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def noisy(
    x: torch.Tensor,
    threshold: int | torch.Tensor,
    key: Key | int | torch.Tensor,
    step: int | torch.Tensor,
    *,
    noise: Noise = UNIT,
    examples: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    key_positions: torch.Tensor | None = None,
    layout: str = "btc",
) -> torch.Tensor:
    """Return `x` under a noise of mean 1.

    Parameters
    ----------
    x : tensor
        float32, float64, bfloat16 or float16, with the axes that `layout` names.
    threshold : int or 0-dim int64 tensor
        In [0, 65536]: 65536 times the rate; for Gaussian noise below 65536. 0 is neutral.
    key : Key, int or 0-dim int64 tensor
        The site's key. Gaussian noise draws from its ``child("gaussian")``.
    step : int, or int64 tensor () or (B,)
        In [0, 2^32). With (B,) each row has a step of its own: the number of a Monte Carlo draw.
    noise : Noise
        Form, whether all positions share the draw, and how many columns do.
    examples, positions, key_positions, layout
        As in `twodice.kernels.dropout.dropout`.

    Returns
    -------
    tensor
        A new tensor of the shape and dtype of `x`.

    Raises
    ------
    ShapeError
        If shapes, layout or dtype do not fit.
    ConfigError
        If a coordinate is outside its range; if Gaussian noise is asked for at p = 1.

    Notes
    -----
    *Randomness.* A pure function of (key, step, example, position, head, column), the position 0 where the
    noise is locked and the column ``column // block``. The backward pass computes the noise again from them,
    and keeps none. At fixed coordinates the noise is linear, so gradients of any order are the same noise.
    ``torch.vmap`` is refused for noise other than ``unit``, as all elements would get one mask.
    """
    one_step = not isinstance(step, torch.Tensor) or step.dim() == 0
    if noise == UNIT and one_step:
        return bernoulli.dropout(
            x, threshold, key, step,
            examples=examples, positions=positions, key_positions=key_positions, layout=layout,
        )  # fmt: skip
    if torch.compiler.is_compiling() or type(x) not in _PLAIN:
        sizes(x, layout)
        y: torch.Tensor = _operation(
            x, bernoulli.scalar(threshold), bernoulli.scalar_key(key), bernoulli.scalar(step),
            examples, positions, key_positions, layout, noise.form, noise.locked, noise.block,
        )  # fmt: skip
        return y
    bits = key.seed if isinstance(key, Key) else key_bits(key)  # type: ignore[arg-type]
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return _transformed(x, threshold, bits, step, examples, positions, key_positions, layout, noise)
    if x.is_cpu:
        # Values now: a schedule's tensor may be changed in place before the backward pass reads it.
        threshold = int(threshold)
        step = bernoulli._whole(step) if one_step else step.clone()  # type: ignore[union-attr]
    given = threshold, bits, step, examples, positions, key_positions, layout, noise
    if torch.is_grad_enabled() and x.requires_grad:
        return _Noisy.apply(x, *given)  # type: ignore[no-any-return]
    return _forward(x, *given)


def kept(
    threshold: int | torch.Tensor,
    key: Key | int,
    step: int | torch.Tensor,
    shape: tuple[int, ...],
    *,
    noise: Noise = UNIT,
    examples: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    key_positions: torch.Tensor | None = None,
    layout: str = "btc",
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Return the mask of a tensor of that shape: True where a unit stays.

    For kinds that select by themselves: whole layers, keys before the softmax, rows of a lookup.

    Parameters
    ----------
    threshold, key, step, noise, examples, positions, key_positions, layout
        As in `noisy`; Gaussian noise has no mask and is an error.
    shape : tuple of int
        With the axes that `layout` names.
    device : torch.device or str, optional
        Where the mask is made; default the CPU.

    Returns
    -------
    bool tensor
        Of that shape.

    Notes
    -----
    *Randomness.* The same decisions as `noisy`.
    """
    if noise.form != "bernoulli":
        raise ConfigError("gaussian noise drops nothing, so it has no mask; use a Bernoulli noise here")
    ones = torch.ones(shape, dtype=torch.bfloat16, device=device)
    return noisy(
        ones, threshold, key, step,
        noise=noise, examples=examples, positions=positions, key_positions=key_positions, layout=layout,
    ) != 0  # fmt: skip


@lru_cache(maxsize=4096)
def _stream(bits: int) -> int:
    """The key of a site's normals. Remembered: hashing costs microseconds."""
    return Key(bits).child("gaussian").seed


def _transformed(
    x: torch.Tensor,
    threshold: int | torch.Tensor,
    key: int,
    step: int | torch.Tensor,
    examples: torch.Tensor | None,
    positions: torch.Tensor | None,
    key_positions: torch.Tensor | None,
    layout: str,
    noise: Noise,
) -> torch.Tensor:
    """By plain operations, which ``torch.func`` and forward-mode AD know; they keep what they need."""
    vmap = torch._C._functorch.TransformType.Vmap
    if any(each.key() == vmap for each in torch._C._functorch.get_interpreter_stack() or ()):
        raise ContractError(
            f"noise {str(noise)!r} is not served under vmap, where all elements would get the same; give the "
            "tensor its batch axis and call it without vmap"
        )
    _check(threshold, step, noise, x, layout)
    where = coordinates(x, layout, examples, positions, key_positions)
    if x.is_cpu:
        _check_given(where, noise)
    stream = _stream(key) if noise.form == "gaussian" else key
    return noise_reference(x, threshold, stream, step, where, layout, noise)


class _Noisy(torch.autograd.Function):
    """The gradient: the same noise on what comes from above. Keeps coordinates only."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *given: Any) -> torch.Tensor:
        threshold, key, step, examples, positions, key_positions, layout, noise = given
        ctx.save_for_backward(examples, positions, key_positions)
        ctx.rest = threshold, key, step, layout, noise
        return _forward(x, *given)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        threshold, key, step, layout, noise = ctx.rest
        examples, positions, key_positions = ctx.saved_tensors
        given = threshold, key, step, examples, positions, key_positions, layout, noise
        twice = torch.is_grad_enabled() and grad.requires_grad
        return (_Noisy.apply(grad, *given) if twice else _forward(grad, *given)), *([None] * 8)


def _forward(
    x: torch.Tensor,
    threshold: int | torch.Tensor,
    key: int,
    step: int | torch.Tensor,
    examples: torch.Tensor | None,
    positions: torch.Tensor | None,
    key_positions: torch.Tensor | None,
    layout: str,
    noise: Noise,
) -> torch.Tensor:
    if x.dtype not in _TYPES:
        raise ShapeError(f"noise serves float32, float64, bfloat16 and float16; got {x.dtype}; cast it first")
    _check(threshold, step, noise, x, layout)
    if noise.form == "gaussian":
        key = _stream(key)
    if noise.form == "bernoulli" and (x.is_cpu or not isinstance(step, torch.Tensor) or step.dim() == 0):
        return _by_dropout(x, threshold, key, step, examples, positions, key_positions, layout, noise)
    if x.is_cpu:
        if _native is not None:
            return _native_gaussian(
                x, int(threshold), key, step, examples, positions, key_positions, layout, noise
            )
        dispatch.say_once_when_slow()
    where = coordinates(x, layout, examples, positions, key_positions)
    if x.is_cpu:
        _check_given(where, noise)
    y = torch.empty_like(x)
    return y.copy_(noise_reference(x, threshold, key, step, where, layout, noise))


def _check(
    threshold: int | torch.Tensor, step: int | torch.Tensor, noise: Noise, x: torch.Tensor, layout: str
) -> None:
    B, _, _, C = sizes(x, layout)
    if isinstance(threshold, int):
        if not 0 <= threshold <= ONE:
            raise ConfigError(f"a threshold must be in [0, {ONE}]; got {threshold}")
        if threshold == ONE and noise.form == "gaussian":
            raise ConfigError("the rate of gaussian noise must be below 1, where its variance has no bound")
    if not isinstance(step, torch.Tensor):
        check_bound("step", step)
    elif step.dim() == 1:
        if tuple(step.shape) != (B,) or step.is_floating_point():
            raise ShapeError(
                f"a step must be one integer, or one for each of the {B} rows; got {step.dtype} of shape "
                f"{tuple(step.shape)}"
            )
        if step.device.type == "cpu":
            check_bounds("step", step)
    elif step.dim() > 1:
        raise ShapeError(f"a step must be one integer, or (B,); got shape {tuple(step.shape)}")
    if noise.form == "gaussian" and -(-C // noise.block) > COLUMNS:
        raise ConfigError(f"gaussian noise has at most {COLUMNS} columns or blocks of them; got {C} columns")


def _check_given(where: Coordinates, noise: Noise) -> None:
    for name, values in where.given():
        check_bounds(name, values)
        if name == "column" and noise.form == "gaussian" and int(values.max()) // noise.block >= COLUMNS:
            raise ConfigError(
                f"a column of gaussian noise must be in [0, {COLUMNS}); got {int(values.max())}"
            )


def _canonical(x: torch.Tensor, layout: str) -> torch.Tensor | None:
    """`x` as (B, H, T, C) without a copy, or None where h and w of ``bchw`` do not join."""
    found = strides(x, layout)
    return None if found is None else x.as_strided(sizes(x, layout), found, x.storage_offset())


def _by_dropout(
    x: torch.Tensor,
    threshold: int | torch.Tensor,
    key: int,
    step: int | torch.Tensor,
    examples: torch.Tensor | None,
    positions: torch.Tensor | None,
    key_positions: torch.Tensor | None,
    layout: str,
    noise: Noise,
) -> torch.Tensor:
    """Bernoulli noise by the dropout kernel: locked as positions 0, blocks as columns that repeat, a step for
    each row as one call for each run of equal steps.
    """
    B, _, T, C = sizes(x, layout)
    example: torch.Tensor | None
    position: torch.Tensor | None
    column: torch.Tensor | None = None
    if noise.block == 1 and follow(key_positions):
        column, key_positions = key_positions, None
    if layout == "nc" or key_positions is not None:
        where = coordinates(x, layout, examples, positions, key_positions)
        if x.is_cpu:
            _check_given(where, noise)  # the kernel sees other numbers than those that were given
        example, position = where.example[:, 0], where.position[:, 0]
        column = None if where.column is None else where.column[:, 0, 0] // noise.block
    else:
        example = None if examples is None else spread("examples", examples, x, layout, B, T)
        position = None if positions is None else spread("positions", positions, x, layout, B, T)
    if example is not None and example.shape != (B, T):
        example = example.expand(B, T)
    if noise.locked:
        if position is not None and x.is_cpu:
            check_bounds("position", position)
        position = _zeros(T, x.device)
    if column is None and noise.block > 1:
        column = _blocks(C, noise.block, x.device)
    y = torch.empty_like(x)
    into, out_of = _canonical(y, layout), _canonical(x, layout)
    if into is None or out_of is None:
        plain = x.contiguous()
        return y.copy_(
            _by_dropout(plain, threshold, key, step, examples, positions, key_positions, layout, noise)
        )
    if not isinstance(step, torch.Tensor) or step.dim() == 0:
        bernoulli.dropout(
            out_of, threshold, key, step,
            examples=example, positions=position, key_positions=column, layout="bhts", out=into,
        )  # fmt: skip
        return y
    if example is None:
        example = torch.arange(B, device=x.device)[:, None].expand(B, T)
    for rows, one in _runs(step):
        bernoulli.dropout(
            out_of[rows], threshold, key, one,
            examples=example[rows],
            positions=position if position is None or position.shape[0] == 1 else position[rows],
            key_positions=column if column is None or column.shape[0] == 1 else column[rows],
            layout="bhts", out=into[rows],
        )  # fmt: skip
    return y


@lru_cache(maxsize=64)
def _zeros(positions: int, device: torch.device) -> torch.Tensor:
    """The positions of locked noise; every step of a training asks for the same."""
    with torch.inference_mode(False):
        return torch.zeros(1, positions, dtype=torch.int64, device=device)


@lru_cache(maxsize=64)
def _blocks(columns: int, block: int, device: torch.device) -> torch.Tensor:
    """The column of the decision for each column."""
    with torch.inference_mode(False):
        return (torch.arange(columns, device=device) // block)[None]


def _runs(step: torch.Tensor) -> list[tuple[slice, int]]:
    """Neighbouring rows with one step, and that step."""
    values, counts = torch.unique_consecutive(step, return_counts=True)
    ends = counts.cumsum(0).tolist()
    return [
        (slice(end - count, end), value)
        for value, count, end in zip(values.tolist(), counts.tolist(), ends, strict=True)
    ]


def _native_gaussian(
    x: torch.Tensor,
    threshold: int,
    key: int,
    step: int | torch.Tensor,
    examples: torch.Tensor | None,
    positions: torch.Tensor | None,
    key_positions: torch.Tensor | None,
    layout: str,
    noise: Noise,
) -> torch.Tensor:
    if x.element_size() == 2:
        # By float32 and one rounding at the end, as the contract has it.
        wide = _native_gaussian(
            x.float(), threshold, key, step, examples, positions, key_positions, layout, noise
        )
        return torch.empty_like(x).copy_(wide)
    shape = B, _, T, C = sizes(x, layout)
    y = torch.empty_like(x)
    into, out_of = strides(y, layout), strides(x, layout)
    if into is None or out_of is None:
        plain = x.contiguous()
        return y.copy_(
            _native_gaussian(plain, threshold, key, step, examples, positions, key_positions, layout, noise)
        )
    where = None
    if layout == "nc" or key_positions is not None:
        where = coordinates(x, layout, examples, positions, key_positions)
    alive = []  # the tensors whose addresses are passed on

    def address(name: str, values: torch.Tensor | None, columns: int) -> tuple[int, tuple[int, int]]:
        if values is None:
            return 0, (0, 0)
        if layout != "nc":
            values = spread(name, values, x, layout, B, columns)
        values = values.to("cpu", torch.int64)
        alive.append(values)
        down, along = values.stride()
        return values.data_ptr(), (
            down if values.shape[0] > 1 else 0,
            along if values.shape[1] > 1 else 0,
        )

    if layout == "nc" and where is not None:
        examples, positions = where.example[:, 0], where.position[:, 0]
    example, position = address("examples", examples, T), address("positions", positions, T)
    column = address("key_positions", key_positions, C)
    steps = (step if isinstance(step, torch.Tensor) else torch.tensor(step)).to(torch.int64).reshape(-1)
    if noise.locked:
        if positions is not None:
            check_bounds("position", positions)
        zero = torch.zeros((), dtype=torch.int64)
        alive.append(zero)
        position = zero.data_ptr(), (0, 0)
    served = _native(
        x.data_ptr(), y.data_ptr(), x.dtype == torch.float64, shape, out_of, into,
        *example, *position, *column, follow(key_positions),
        steps.data_ptr(), steps.stride(0) if steps.numel() > 1 else 0,
        key, float(deviation(threshold)), noise.block, torch.get_num_threads(),
    )  # fmt: skip
    if not served:
        _check_given(coordinates(x, layout, examples, positions, key_positions), noise)
        check_bounds("step", steps)
    return y


@torch.library.custom_op("twodice::noisy", mutates_args=())
def _operation(
    x: torch.Tensor,
    threshold: torch.Tensor,
    key: torch.Tensor,
    step: torch.Tensor,
    examples: torch.Tensor | None,
    positions: torch.Tensor | None,
    key_positions: torch.Tensor | None,
    layout: str,
    form: str,
    locked: bool,
    block: int,
) -> torch.Tensor:
    noise = Noise("gaussian" if form == "gaussian" else "bernoulli", locked, block)
    on_host = x.is_cpu
    return _forward(
        x,
        int(threshold) if on_host else threshold,
        int(key) % (1 << 64),
        int(step) if on_host and step.dim() == 0 else step,
        examples, positions, key_positions, layout, noise,
    )  # fmt: skip


@_operation.register_fake
def _(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(x)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[1:7])
    ctx.rest = inputs[7:]


def _gradient(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    for_x = _operation(grad, *ctx.saved_tensors, *ctx.rest) if ctx.needs_input_grad[0] else None
    return for_x, *([None] * 10)


_operation.register_autograd(_gradient, setup_context=_keep)
