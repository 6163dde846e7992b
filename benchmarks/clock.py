"""Time, memory and arithmetic of a run on any device."""

import os
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

Parts = Mapping[str, Sequence[tuple[object, str]]]  # stage -> (object, name of its method) pairs


class Laps:
    """Seconds since its latest start, under the names it is called with; it synchronises with the device each time."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, {}
        self.restart()

    def restart(self) -> None:
        """What was done before is preparation, and not timed."""
        self.start = now(self.device)

    def __call__(self, name: str) -> None:
        self.seconds[name] = now(self.device) - self.start


class Stopwatch:
    """Context in which the calls of some methods are timed, each without what it calls of the others.

    Args:
        parts: which methods make up which stage.
        device: synchronised with around every call, so a stopwatch slows a GPU down: time whole runs without it.
    """

    def __init__(self, parts: Parts, device: torch.device):
        self.parts, self.device = parts, device
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner = [0.0]  # per open call: seconds spent in the calls below it

    def __enter__(self) -> "Stopwatch":
        with ExitStack() as stack:
            for stage, methods in self.parts.items():
                for owner, name in methods:
                    stack.enter_context(mock.patch.object(owner, name, self._timed(stage, getattr(owner, name))))
            self._undo = stack.pop_all()
        return self

    def __exit__(self, *_) -> None:
        self._undo.close()

    def _timed(self, stage: str, method: Callable) -> Callable:
        def call(*args, **kwargs):
            start = now(self.device)
            self._inner.append(0.0)
            result = method(*args, **kwargs)
            total = now(self.device) - start
            self.seconds[stage] += total - self._inner.pop()
            self._inner[-1] += total
            return result

        return call


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """The most memory that a call holds at a time beyond what is held before it, in bytes."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    cpu = torch.profiler.ProfilerActivity.CPU
    with _silent_stderr(), torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        function()
    held = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@contextmanager
def _silent_stderr():
    """Without what the profiler's C++ code logs on every start and stop."""
    kept = os.dup(2)
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def saved_bytes(function: Callable[[], object], model: nn.Module) -> int:
    """What the forward pass keeps for the backward pass, in bytes; each storage counts once, the model's not at all."""
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}  # holding on to the tensors keeps an address from being given out twice

    def note(x: Tensor) -> Tensor:
        if (address := x.untyped_storage().data_ptr()) not in own:
            kept[address] = x
        return x

    with saved_tensors_hooks(note, lambda x: x):
        function()
    return sum(x.untyped_storage().nbytes() for x in kept.values())


def count_gflops(function: Callable[[], object]) -> float:
    """Matrix products, convolutions and attention that go through PyTorch's own operators, in units of 1e9."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() / 1e9
