"""What kernels read, write and multiply in Triton's interpreter, and what autograd keeps: for the byte models, against races, and for TF32.

The interpreter runs the programs of a launch one after the other, so that two programs which write the same element, a race
on a GPU, go unnoticed: the second one repairs what the first did. Here they are counted.

Called by: tests/kernels, inside functions that the `interpreted` fixture runs; triton is imported there and not before.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from kernels.traffic import Traffic


@dataclass
class Launch:
    """Bytes of one launch: all that its programs asked to read, the distinct ones among them, and the same for writes.

    precisions: of its products, like "IEEE"; the interpreter itself takes no notice of them.
    """

    kernel: str
    asked: int = 0
    read: int = 0
    asked_to_write: int = 0
    written: int = 0
    precisions: set[str] = field(default_factory=set)
    _loads: list[tuple[np.ndarray, int]] = field(default_factory=list)
    _stores: list[tuple[np.ndarray, int]] = field(default_factory=list)

    def close(self) -> None:
        self.asked, self.read = _sizes(self._loads)
        self.asked_to_write, self.written = _sizes(self._stores)
        self._loads, self._stores = [], []


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Inside, every launch adds itself to the list, in order."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    launches: list[Launch] = []
    call, load, store, dot = (
        GridExecutor.__call__,
        InterpreterBuilder.create_masked_load,
        InterpreterBuilder.create_masked_store,
        InterpreterBuilder.create_dot,
    )

    def launch(self, *args, **kwargs):
        launches.append(Launch(self.fn.__name__))
        result = call(self, *args, **kwargs)
        launches[-1].close()
        return result

    def recorded_load(self, ptrs, mask, *rest):
        launches[-1]._loads.append(_touched(ptrs, mask))
        return load(self, ptrs, mask, *rest)

    def recorded_store(self, ptrs, value, mask, *rest):
        launches[-1]._stores.append(_touched(ptrs, mask))
        return store(self, ptrs, value, mask, *rest)

    def recorded_dot(self, a, b, d, input_precision, *rest):
        launches[-1].precisions.add(input_precision.name)
        return dot(self, a, b, d, input_precision, *rest)

    with (
        patch.object(GridExecutor, "__call__", launch),
        patch.object(InterpreterBuilder, "create_masked_load", recorded_load),
        patch.object(InterpreterBuilder, "create_masked_store", recorded_store),
        patch.object(InterpreterBuilder, "create_dot", recorded_dot),
    ):
        yield launches


def launches_of(function: Callable[..., object], *args: object, **options: object) -> list[Launch]:
    """The launches of one call."""
    with recorded_launches() as launches:
        function(*args, **options)
    return launches


def assert_touched(found: Iterable[Launch], wanted: Iterable[Traffic]) -> None:
    """The bytes of each launch are those of its model, and no element is written by two programs."""
    found = list(found)
    touched, models = ([(each.read, each.written) for each in part] for part in (found, wanted))
    assert touched == models, f"(read, written) of each launch: {touched}, the models say {models}"
    for launch in found:
        assert launch.asked_to_write == launch.written, f"an element is written by two programs of {launch.kernel}"


def bytes_saved(function: Callable[[], Tensor], *, beside: Iterable[Tensor] = ()) -> int:
    """What is kept for the backward pass of a call, a tensor that is kept twice once, without those `beside`."""
    addresses = {tensor.data_ptr() for tensor in beside}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = function()
    assert output.requires_grad
    return sum(size for address, size in kept.items() if address not in addresses)


def _touched(ptrs, mask) -> tuple[np.ndarray, int]:
    """The addresses that the mask lets through, and the bytes behind each."""
    itemsize = ptrs.get_element_ty().primitive_bitwidth // 8
    return ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape).astype(bool)].ravel(), itemsize


def _sizes(touched: list[tuple[np.ndarray, int]]) -> tuple[int, int]:
    all_bytes = sum(len(addresses) * itemsize for addresses, itemsize in touched)
    distinct = 0
    for size in {itemsize for _, itemsize in touched}:
        distinct += size * len(np.unique(np.concatenate([each for each, itemsize in touched if itemsize == size])))
    return all_bytes, distinct
