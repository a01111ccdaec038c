"""Arrays of other libraries: NumPy, and whatever speaks DLPack, in as tensors and out as they came.

The file knows memory and types; it knows no logits. Nothing is copied where torch can read the memory as it
lies: a copy is made of negative strides, of strides that are no multiple of an item, and of foreign byte
order.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from twodice.errors import RequestError, ShapeError

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""What logits may be. torch has floats of 8 bits too, which nobody draws from."""
Result = TypeVar("Result")
Leave = Callable[[Tensor], Any]


class _Writable:
    """The memory of a read-only array as torch takes it without a warning; nothing here writes logits."""

    def __init__(self, array: npt.NDArray[Any]) -> None:
        self.array = array  # keeps the memory
        interface = array.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}


def _of_numpy(name: str, array: npt.NDArray[Any]) -> Tensor:
    if isinstance(array, np.ma.MaskedArray):
        raise ShapeError(f"{name} must be a plain array; got a masked one: fill what is masked, with -inf")
    if array.dtype.name == "bfloat16":  # of ml_dtypes; torch knows these 16 bits and not that type
        return _of_numpy(name, array.view(np.int16)).view(torch.bfloat16)
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        raise ShapeError(f"{name} must be numbers of at most 64 bits; got an array of {array.dtype}")
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if any(stride < 0 or stride % array.itemsize for stride in array.strides):
        array = np.ascontiguousarray(array)
    return torch.from_numpy(array if array.flags.writeable else np.asarray(_Writable(array)))


def readable(name: str, tensor: Tensor) -> Tensor:
    """The tensor, if it has memory that lies row by row."""
    if tensor.layout != torch.strided:
        raise ShapeError(f"{name} must be dense; got {tensor.layout}: .to_dense() makes it so")
    if tensor.is_meta:
        raise ShapeError(
            f"{name} must have values; got a tensor of shape {tuple(tensor.shape)} on the device 'meta', "
            "which has none: compute it on the CPU or a GPU, with a model whose weights are loaded"
        )
    return tensor


def tensor_of(name: str, value: Any, *, exact: bool = False) -> Tensor:
    """A tensor over the memory of an array, or of a list of numbers; `name` is what errors call it.

    With `exact`, the floats of a list keep their 64 bits; torch makes them float32.
    """
    if isinstance(value, Tensor):
        return readable(name, value)
    if isinstance(value, np.ndarray):
        return _of_numpy(name, value)
    if hasattr(value, "__dlpack__"):
        try:
            return torch.utils.dlpack.from_dlpack(value)  # type: ignore[attr-defined, no-any-return]
        except (BufferError, RuntimeError, TypeError) as error:
            raise ShapeError(
                f"{name} must be an array that torch can read by DLPack; got {type(value).__name__}: {error}"
            ) from error
    try:
        if not exact:
            return torch.as_tensor(value)
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ShapeError(
            f"{name} must be a tensor, a NumPy array, an array with __dlpack__, or numbers; "
            f"got {_unreadable(value, error)}"
        ) from error
    return _of_numpy(name, array)


def _unreadable(value: Any, error: Exception) -> str:
    """What came that makes no tensor; torch's own words only of lists, whose parts it names."""
    if value is None:
        return "None"
    name = type(value).__name__
    if isinstance(getattr(value, "logits", None), Tensor):
        return f"{name}, what a model returns: give its logits; .logits[:, -1] has the last position's"
    if str(error).startswith("Overflow"):
        return "an integer beyond 64 bits"
    if not isinstance(value, list | tuple):
        return name
    if any(isinstance(one, Tensor) for one in value):
        return f"a {name} of tensors: torch.stack makes one of them"
    if texts := [one for one in value if isinstance(one, str)]:
        return f"a {name} with text in it, {texts[0]!r}"
    lengths = [len(one) for one in value if isinstance(one, list | tuple)]
    if len(set(lengths)) > 1:
        return f"rows of {min(lengths)} to {max(lengths)}: they must be of one length"
    return f"{name}: {error}"


def integers_of(name: str, value: Any, must: str = "integers") -> Tensor:
    """The same as contiguous int64 on the CPU; `must` is what errors ask for."""
    found = tensor_of(name, value)
    if found.dtype == torch.int64 and found.is_cpu and found.is_contiguous():
        return found  # as engines keep them: no microsecond for nothing
    whole = not (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool)
    if not whole and found.numel():  # an empty list comes as floats
        raise ShapeError(f"{name} must be {must}; got {found.dtype}")
    signed = found.to("cpu", torch.int64).contiguous()
    if found.dtype == torch.uint64 and bool((signed < 0).any()):
        raise RequestError(
            f"{name} must be {must}, each below 2^63; got {int(signed[signed < 0][0]) % 2**64}"
        )
    return signed


def _leave(like: Any) -> Leave:
    """From a tensor to an array of the kind of `like`; a tensor stays one where no way is known."""
    if isinstance(like, np.ndarray):
        return lambda tensor: tensor.numpy()
    if hasattr(like, "__array_namespace__"):  # CuPy, JAX, and NumPy's own kind
        back: Leave = like.__array_namespace__().from_dlpack
        return back
    module = sys.modules.get(type(like).__module__.partition(".")[0])
    if hasattr(like, "__dlpack__") and hasattr(module, "from_dlpack"):
        back = module.from_dlpack  # type: ignore[union-attr]
        return back
    if hasattr(like, "__dlpack__") and type(like).__module__.startswith("tensorflow."):
        taken = module.experimental.dlpack.from_dlpack  # type: ignore[union-attr]
        return lambda tensor: taken(tensor.__dlpack__())
    return lambda tensor: tensor


def returned(result: Result, like: Any) -> Result:
    """`result`, a dataclass of tensors, with each as an array of the kind of `like`.

    But for a `state` that this kind would round, as JAX does without x64: it decides the next token, which
    must be that of any other kind, so it comes as a NumPy array.
    """
    leave = _leave(like)

    def converted(value: Any) -> Any:
        if isinstance(value, Tensor):
            return leave(value)
        if isinstance(value, dict):
            return {name: converted(one) for name, one in value.items()}
        if isinstance(value, tuple):
            return tuple(converted(one) for one in value)
        return value

    values = {field.name: getattr(result, field.name) for field in fields(result)}  # type: ignore[arg-type]
    for name, value in values.items():
        found = converted(value)
        if name == "state" and value is not None and "float64" not in str(found.dtype):
            found = value.cpu().numpy()
        setattr(result, name, found)
    return result
