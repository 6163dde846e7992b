"""Counts what would be a host-device synchronisation on a GPU, on a machine without one."""

import contextlib

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# Reading values: item, bool, int, float and index all end in _local_scalar_dense. Shapes that depend on values.
SYNCHRONIZING_OPERATORS = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.repeat_interleave.Tensor,
    aten._unique2.default,
    aten.unique_consecutive.default,
}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
# What a CPU does without an operator. Tensors from Python numbers would be copied to the GPU, which synchronises, too.
SYNCHRONIZING_FUNCTIONS = {Tensor.tolist, Tensor.numpy, Tensor.cpu, torch.tensor, torch.as_tensor, torch.from_numpy}


class _Operators(TorchDispatchMode):
    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        found = func in SYNCHRONIZING_OPERATORS and kwargs.get("output_size") is None
        if func in INDEXING:  # an index of booleans has to be counted
            found = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        if found:
            self.found.append(str(func))
        return func(*args, **kwargs)


class _Functions(TorchFunctionMode):
    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in SYNCHRONIZING_FUNCTIONS:
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def host_reads():
    """List that fills with the names of such calls, in order."""
    found: list[str] = []
    with _Operators(found), _Functions(found):
        yield found
