"""`sample` on arrays of other libraries: the tokens of the same tensor, and results of the kind that came."""

from __future__ import annotations

import types
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from twodice.errors import ShapeError
from twodice.kernels.sampling_settings import NEEDS
from twodice.sampling.params import SamplingParams
from twodice.sampling.sample import sample

PARAMS = [SamplingParams(seed=i, top_k=[None, 9][i % 2], repetition_penalty=1.5) for i in range(6)]
PAST = ([1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6], [0] * 6)
MIRO = SamplingParams(seed=3, mirostat_tau=4.0)


class Foreign:
    """An array of another library: DLPack is all that it has."""

    def __init__(self, inside: torch.Tensor) -> None:
        self.inside = inside

    def __dlpack__(self, **how: Any) -> Any:
        return self.inside.__dlpack__(**how)

    def __dlpack_device__(self) -> Any:
        return self.inside.__dlpack_device__()


class Standard(Foreign):
    """The same with the array API's way back."""

    def __array_namespace__(self) -> Any:
        return types.SimpleNamespace(from_dlpack=lambda tensor: Standard(torch.from_dlpack(tensor)))


class Rounding(Foreign):
    """The same of a library without 64 bits, as JAX is without x64."""

    def __array_namespace__(self) -> Any:
        return types.SimpleNamespace(from_dlpack=lambda tensor: tensor.float().numpy())


def logits_of(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(6, 40, generator=torch.Generator().manual_seed(0)).to(dtype)


def drawn(logits: Any, convert: Any = lambda value: value) -> Any:
    return sample(logits, PARAMS, convert(torch.arange(6)), need=NEEDS,
                  history=tuple(convert(torch.tensor(part)) for part in PAST),
                  completion=convert(torch.arange(6) % 2))  # fmt: skip


def assert_same(found: Any, wanted: Any, back: Any) -> None:
    for name in ("tokens", "status", "rank", "logprob", "entropy", "raw_logprob", "kept_mass"):
        assert torch.equal(back(getattr(found, name)), getattr(wanted, name)), name
    assert all(torch.equal(back(a), b) for a, b in zip(found.kept, wanted.kept, strict=True))
    assert found.seeds == wanted.seeds


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_numpy_in_and_numpy_out(dtype: torch.dtype) -> None:
    x = logits_of(dtype)
    found = drawn(x.numpy(), lambda tensor: tensor.numpy())
    assert all(isinstance(v, np.ndarray) for v in (found.tokens, found.status, found.logprob, *found.kept))
    assert found.tokens.dtype == np.int64 and found.logprob.dtype == np.float64
    assert_same(found, drawn(x), torch.from_numpy)


def test_state_and_mask_may_be_arrays_too() -> None:
    x = logits_of()
    mask = np.full((6, 2), 0x0F0F0F0F, np.int32)
    first = sample(x.numpy(), MIRO, 0, allowed_mask=mask)
    again = sample(x.numpy(), MIRO, 1, allowed_mask=mask, state=first.state)
    wanted = sample(x, MIRO, 1, allowed_mask=torch.from_numpy(mask), state=torch.from_numpy(first.state))
    assert isinstance(again.state, np.ndarray)
    assert np.array_equal(again.state, wanted.state) and np.array_equal(again.tokens, wanted.tokens)


LAYOUTS = {
    "read-only": lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
    "negative strides": lambda x: np.ascontiguousarray(x[::-1, ::-1])[::-1, ::-1],
    "Fortran order": np.asfortranarray,
    "foreign byte order": lambda x: x.astype(x.dtype.newbyteorder()),
    "strides of half an item": lambda x: np.lib.stride_tricks.as_strided(
        np.frombuffer(b"".join(row.tobytes() + b"\0\0" for row in x) + b"\0" * 4, np.float32),
        x.shape, (x.shape[1] * 4 + 2, 4), writeable=False),
    "one row repeated": lambda x: np.broadcast_to(x[0], x.shape),
}  # fmt: skip


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_memory_may_lie_in_any_way(layout: str) -> None:
    x = LAYOUTS[layout](logits_of().numpy())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = drawn(x)
    assert_same(found, drawn(torch.from_numpy(np.array(x, np.float32))), torch.from_numpy)


def test_read_only_memory_is_read_where_it_lies() -> None:
    from twodice.sampling.arrays import tensor_of

    x = np.ones((2, 3), np.float32)
    x.setflags(write=False)
    assert tensor_of("logits", x).data_ptr() == x.ctypes.data


def test_bfloat16_of_ml_dtypes() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = logits_of(torch.bfloat16)
    array = x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    assert_same(drawn(array), drawn(x), torch.from_numpy)


def test_an_array_with_a_namespace_comes_back_through_it() -> None:
    found = drawn(Standard(logits_of()), Standard)
    assert isinstance(found.tokens, Standard) and isinstance(found.kept[1], Standard)
    assert_same(found, drawn(logits_of()), lambda array: array.inside)


def test_a_module_with_from_dlpack_is_the_way_back(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("foreign_arrays")
    module.from_dlpack = lambda tensor: Foreign(torch.from_dlpack(tensor))  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, "foreign_arrays", module)
    monkeypatch.setattr(Foreign, "__module__", "foreign_arrays.core")
    found = drawn(Foreign(logits_of()))
    assert isinstance(found.tokens, Foreign)
    assert_same(found, drawn(logits_of()), lambda array: array.inside)


def test_dlpack_alone_gives_tensors() -> None:
    assert_same(drawn(Foreign(logits_of())), drawn(logits_of()), lambda tensor: tensor)


def test_jax_in_and_jax_out() -> None:
    jax = pytest.importorskip("jax")
    for dtype in (jax.numpy.float32, jax.numpy.bfloat16):
        x = jax.numpy.asarray(logits_of().numpy()).astype(dtype)
        found = sample(x, PARAMS[0], 3, history=PAST, need=("logprob",))
        wanted = sample(torch.from_dlpack(x), PARAMS[0], 3, history=PAST)
        assert isinstance(found.tokens, jax.Array) and isinstance(found.logprob, jax.Array)
        assert np.asarray(found.tokens).tolist() == wanted.tokens.tolist()


def test_a_state_that_jax_would_round_comes_as_numpy_and_goes_on_to_the_bit() -> None:
    jax = pytest.importorskip("jax")
    x = jax.numpy.asarray(logits_of().numpy())
    ours = theirs = None
    for position in range(20):
        found = sample(x, MIRO, position, state=ours)
        wanted = sample(torch.from_dlpack(x), MIRO, position, state=theirs)
        ours, theirs = found.state, wanted.state
        assert isinstance(ours, np.ndarray) and ours.tolist() == theirs.tolist()
        assert isinstance(found.tokens, jax.Array) and found.tokens.tolist() == wanted.tokens.tolist()


def test_a_state_is_not_rounded_by_a_library_without_64_bits() -> None:
    found = sample(Rounding(logits_of()), MIRO, 0, need=("logprob",))
    wanted = sample(logits_of(), MIRO, 0)
    assert found.logprob.dtype == np.float32, "as this library has it"
    assert found.state.dtype == np.float64 and found.state.tolist() == wanted.state.tolist()


def test_tensorflow_in_and_tensorflow_out() -> None:
    tensorflow = pytest.importorskip("tensorflow")
    x = tensorflow.constant(logits_of().numpy())
    found = sample(x, PARAMS[0], 3, history=PAST, need=("kept",))
    assert all(tensorflow.is_tensor(v) for v in (found.tokens, *found.kept))
    wanted = sample(logits_of(), PARAMS[0], 3, history=PAST)
    assert found.tokens.numpy().tolist() == wanted.tokens.tolist()


@pytest.mark.parametrize(
    ("logits", "said"),
    [
        (np.zeros((2, 3), np.int64), "floats; got .*int64"),
        (np.zeros((2, 3), np.uint16), "floats; got .*uint16"),
        (np.zeros((2, 3), bool), "floats; got .*bool"),
        (np.zeros((2, 3), complex), "logits must be numbers of at most 64 bits; got an array of complex128"),
        (np.zeros((2, 3), np.longdouble), "logits must be numbers of at most 64 bits; got an array of"),
        (np.array([["a"]]), "logits must be numbers"),
        (np.ma.masked_array([[1.0, 2.0]], [[True, False]]), "masked one: fill"),
        (np.zeros(()), "rows, vocabulary"),
        (
            object(),
            "logits must be a tensor, a NumPy array, an array with .*; got object",
        ),
        ([["a"]], "logits must be a tensor"),
    ],
)
def test_what_holds_no_logits_is_an_error_that_says_so(logits: Any, said: str) -> None:
    with pytest.raises(ShapeError, match=said):
        sample(logits, SamplingParams(seed=0), 0)


def test_a_failure_inside_dlpack_names_the_argument() -> None:
    class Broken(Foreign):
        def __dlpack__(self, **how: Any) -> Any:
            raise BufferError("the memory has gone")

    with pytest.raises(ShapeError, match=r"logits must be an array that torch can read.*the memory has gone"):
        sample(Broken(logits_of()), SamplingParams(seed=0), 0)
