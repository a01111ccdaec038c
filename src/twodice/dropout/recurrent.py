"""The training forward of ``nn.LSTM``, ``nn.GRU`` and ``nn.RNN``: noise between layers, and weights dropped.

torch's fused call takes one rate and draws from its hidden generator. Here each layer is a fused call of its
own, so that what lies between two layers can be dropped by key; dropped weights are tensors of this one call,
and the parameters stay what they are. Knows neither plan nor hooks.

Letters: B rows, T positions, C columns, D directions, L layers, N rows of a packed sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from twodice.errors import ConfigError, ShapeError, nearest
from twodice.kernels.noise import UNIT, Noise, noisy
from twodice.random.keys import Key

_FUSED: dict[str, Callable[..., Any]] = {
    "LSTM": torch._VF.lstm,  # type: ignore[attr-defined]
    "GRU": torch._VF.gru,  # type: ignore[attr-defined]
    "RNN_TANH": torch._VF.rnn_tanh,  # type: ignore[attr-defined]
    "RNN_RELU": torch._VF.rnn_relu,  # type: ignore[attr-defined]
}
Rate = int | torch.Tensor
Between = tuple[Rate, Key | int] | tuple[Rate, Key | int, str | Noise]


class _Sequence(NamedTuple):
    """The input as the fused call takes it, and where its rows stood."""

    data: torch.Tensor  # (B, T, C), (T, B, C), or packed (N, C)
    sizes: torch.Tensor | None  # of a packed sequence: how many rows each position has
    rows: int
    layout: str
    examples: torch.Tensor | None
    positions: torch.Tensor | None
    step: int | torch.Tensor


def recurrent_forward(
    module: nn.RNNBase,
    inputs: torch.Tensor | PackedSequence,
    hidden: Any = None,
    *,
    step: int | torch.Tensor,
    between: Between | None = None,
    weight: tuple[Rate, Key | int] | Mapping[str, tuple[Rate, Key | int]] | None = None,
    examples: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    training: bool | None = None,
) -> tuple[Any, Any]:
    """Run a recurrent module with dropout by key, and return what its own forward returns.

    Parameters
    ----------
    module : nn.LSTM, nn.GRU or nn.RNN
        Of any number of layers and directions, batch first or not; projections (``proj_size``) are refused.
    inputs : tensor or PackedSequence
        As for the module: (B, T, C) or (T, B, C), (T, C) without a batch, or packed.
    hidden : optional
        As for the module.
    step : int, or int64 tensor () or (B,)
        In [0, 2^32); (B,) only where no weights are dropped.
    between : (threshold, key) or (threshold, key, noise), optional
        What is dropped between the layers, in [0, 65536]: 65536 times the rate. Noise ``unit`` draws anew at
        each position (Zaremba et al. 2014); ``feature`` once for all positions (Gal and Ghahramani 2016).
        The module's own ``dropout`` is then off; with None it is left alone.
    weight : (threshold, key), or a mapping of parameter names to such, optional
        Weights that are dropped: the pair means every recurrent matrix, ``weight_hh_l0`` and so on.
    examples : int64 tensor (B,) or (B, T), optional
        Slots in the global batch; default 0 .. B-1.
    positions : int64 tensor (B, T) or (1, T), optional
        Default 0 .. T-1.
    training : bool, optional
        Default ``module.training``. False is the module's own forward, bit for bit.

    Returns
    -------
    tuple
        Output and hidden state.

    Raises
    ------
    ConfigError
        If the module has projections or is of another kind, if a mapping names a parameter that it has not,
        or a rate is out of range.
    ShapeError
        If shapes do not fit, or weights are dropped with a step for each row.

    Notes
    -----
    *Randomness.* The input of layer l (1 .. L-1) is dropped under ``key.child("layer", l)`` at (example,
    position, column). A matrix is dropped under ``key.child(name)``, in a mapping under the key itself, with
    example := output unit, position 0, column := input unit: once a step, whichever rows and positions come.

    Zaremba, Sutskever and Vinyals 2014 (arXiv 1409.2329): only the connections that are not recurrent. They
    drop the input of the first layer and the output of the last as well: that is `twodice.dropout` before and
    after this call. Gal and Ghahramani 2016 (arXiv 1512.05287) also lock a mask on the state within the cell,
    which no fused call offers. Merity, Keskar and Socher 2017 (arXiv 1708.02182, AWD-LSTM): DropConnect on
    the recurrent matrices, one mask a forward, here one a step; never in eval, where the variational branch
    of their code leaves it on.
    """
    if not isinstance(module, nn.LSTM | nn.GRU | nn.RNN):
        raise ConfigError(
            f"a recurrent forward serves nn.LSTM, nn.GRU and nn.RNN; got {type(module).__name__}"
        )
    if module.proj_size:
        raise ConfigError(
            f"projections (proj_size={module.proj_size}) are not served; leave this {module.mode} out of the "
            "plan, or build it with proj_size=0 and a linear layer behind it"
        )
    if not (module.training if training is None else training):
        return type(module).forward(module, inputs, hidden)  # type: ignore[arg-type]
    weights = _weights(module, weight, step)
    sequence, order, batched = _prepare(module, inputs, step, examples, positions)
    state = _state(module, sequence, hidden, order, batched)
    noise = UNIT if between is None or len(between) == 2 else Noise.parse(between[2])
    if between is None or _is_zero(between[0]) or module.num_layers == 1:
        own = module.dropout if between is None else 0.0
        output, state = _fused(module, sequence.data, sequence.sizes, state, weights, module.num_layers, own)
    else:
        output, state = _by_layers(module, sequence, state, weights, between[0], between[1], noise)
    return _as_given(module, inputs, output, state, batched)


def _is_zero(threshold: Rate) -> bool:
    """Whether nothing is dropped, as far as that is known without reading a device."""
    return not isinstance(threshold, torch.Tensor) and threshold == 0


def _weights(
    module: nn.RNNBase, weight: tuple[Any, Any] | Mapping[str, tuple[Any, Any]] | None, step: Any
) -> list[list[torch.Tensor]]:
    """The tensors of each layer and direction, dropped where that is asked for."""
    names: list[list[str]] = (
        module._all_weights
    )  # of each layer and direction, in the order of the fused call
    flat = [name for some in names for name in some]
    dropped: dict[str, torch.Tensor] = {}
    if weight is not None:
        if isinstance(step, torch.Tensor) and step.dim() > 0:
            raise ShapeError(
                "weights are shared by all rows, so they need one step; got one for each row; leave weight "
                "out, or run the draws one by one"
            )
        if not isinstance(weight, Mapping):
            t, key = weight
            root = key if isinstance(key, Key) else Key(key)
            weight = {name: (t, root.child(name)) for name in flat if name.startswith("weight_hh")}
        for name, (t, key) in weight.items():
            if name not in flat:
                raise ConfigError(f"{module.mode} has no parameter {name!r}{nearest(name, flat)}")
            value = getattr(module, name)
            if value.dim() != 2:
                raise ConfigError(f"only matrices are dropped; {name!r} has shape {tuple(value.shape)}")
            dropped[name] = value if _is_zero(t) else noisy(value, t, key, step, layout="bc")
    return [[dropped[n] if n in dropped else getattr(module, n) for n in some] for some in names]


def _prepare(
    module: nn.RNNBase,
    inputs: torch.Tensor | PackedSequence,
    step: int | torch.Tensor,
    examples: torch.Tensor | None,
    positions: torch.Tensor | None,
) -> tuple[_Sequence, torch.Tensor | None, bool]:
    """The sequence, the order into which its rows were sorted, and whether it came with a batch."""
    if isinstance(inputs, PackedSequence):
        data, sizes, order, _ = inputs
        rows = int(sizes[0])
        slot = torch.cat([torch.arange(int(n)) for n in sizes])  # row among the sorted ones, of each of the N
        place = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        slot, place = slot.to(data.device), place.to(data.device)
        row = slot if order is None else order[slot]  # as the rows were before they were sorted
        if examples is not None and examples.shape[0] != rows:
            raise ShapeError(f"examples must have one entry for each of {rows} rows; got {examples.shape[0]}")
        example = row if examples is None else examples[row] if examples.dim() == 1 else examples[row, place]
        position = place
        if positions is not None:
            position = positions[row if positions.shape[0] > 1 else torch.zeros_like(row), place]
        if isinstance(step, torch.Tensor) and step.dim() == 1:
            step = step[row]
        return _Sequence(data, sizes, rows, "nc", example, position, step), order, True
    if inputs.dim() not in (2, 3):
        raise ShapeError(f"{module.mode} takes 2 or 3 dimensions; got shape {tuple(inputs.shape)}")
    axis = 0 if module.batch_first else 1
    batched = inputs.dim() == 3
    data = inputs if batched else inputs.unsqueeze(axis)
    layout = "btc" if module.batch_first else "tbc"
    return _Sequence(data, None, data.shape[axis], layout, examples, positions, step), None, batched


def _state(
    module: nn.RNNBase, sequence: _Sequence, hidden: Any, order: torch.Tensor | None, batched: bool
) -> tuple[torch.Tensor, ...]:
    """The first hidden state as (h,) or (h, c), each (L * D, B, C), in the order of the rows."""
    count = 2 if module.mode == "LSTM" else 1
    if hidden is None:
        total = module.num_layers * (2 if module.bidirectional else 1)
        data = sequence.data
        zeros = torch.zeros(total, sequence.rows, module.hidden_size, dtype=data.dtype, device=data.device)
        state: tuple[torch.Tensor, ...] = (zeros,) * count
    else:
        state = tuple(hidden) if count == 2 else (hidden,)
        if any(part.dim() != (3 if batched else 2) for part in state):
            raise ShapeError(
                f"the hidden state must have {3 if batched else 2} dimensions, as the input has a batch or "
                f"not; got {[tuple(part.shape) for part in state]}"
            )
        if not batched:
            state = tuple(part.unsqueeze(1) for part in state)
        if order is not None:
            state = tuple(part.index_select(1, order) for part in state)
    module.check_forward_args(sequence.data, state if count == 2 else state[0], sequence.sizes)  # type: ignore
    return state


def _fused(
    module: nn.RNNBase,
    data: torch.Tensor,
    sizes: torch.Tensor | None,
    state: tuple[torch.Tensor, ...],
    weights: list[list[torch.Tensor]],
    layers: int,
    own: float,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """One call of torch's kernel for so many layers."""
    flat = [tensor for some in weights for tensor in some]
    hx: Any = state if module.mode == "LSTM" else state[0]
    rest = flat, module.bias, layers, float(own), True, module.bidirectional
    if sizes is None:
        output, *after = _FUSED[module.mode](data, hx, *rest, module.batch_first)
    else:
        output, *after = _FUSED[module.mode](data, sizes, hx, *rest)
    return output, tuple(after)


def _by_layers(
    module: nn.RNNBase,
    sequence: _Sequence,
    state: tuple[torch.Tensor, ...],
    weights: list[list[torch.Tensor]],
    threshold: Rate,
    key: Key | int,
    noise: Noise,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """One call a layer, and noise on what each hands to the next."""
    directions = 2 if module.bidirectional else 1
    root = key if isinstance(key, Key) else Key(key)
    x, after = sequence.data, []
    for layer in range(module.num_layers):
        if layer:
            x = noisy(
                x, threshold, root.child("layer", layer), sequence.step, noise=noise,
                examples=sequence.examples, positions=sequence.positions, layout=sequence.layout,
            )  # fmt: skip
        own = slice(layer * directions, (layer + 1) * directions)
        x, last = _fused(module, x, sequence.sizes, tuple(part[own] for part in state), weights[own], 1, 0.0)
        after.append(last)
    return x, tuple(torch.cat(parts) for parts in zip(*after, strict=True))


def _as_given(
    module: nn.RNNBase, inputs: Any, output: torch.Tensor, state: tuple[torch.Tensor, ...], batched: bool
) -> tuple[Any, Any]:
    """Output and state in the form of the module's own forward."""
    given: Any = output
    if isinstance(inputs, PackedSequence):
        back = inputs.unsorted_indices
        given = PackedSequence(output, inputs.batch_sizes, inputs.sorted_indices, back)
        if back is not None:
            state = tuple(part.index_select(1, back) for part in state)
    elif not batched:
        given = output.squeeze(0 if module.batch_first else 1)
        state = tuple(part.squeeze(1) for part in state)
    return given, state if module.mode == "LSTM" else state[0]
