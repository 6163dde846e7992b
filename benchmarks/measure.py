"""All modes of one model, run interleaved."""

import sys
from collections.abc import Mapping, Sequence
from typing import Protocol

from rich.progress import track

from .cases import Case
from .clock import Laps, Parts, Stopwatch, peak_bytes
from .images import Batch


class Host(Protocol):
    """What can be measured: ``hosts.Trunk`` and its kin, ``llava.Llava``, ``training.TrainingStep``.

    Attributes:
        measures: what a step times, the last being the whole step -> the stages it is made of; None for all.
    """

    measures: Mapping[str, Sequence[str] | None]
    cases: Sequence[Case]
    batches: Sequence[Batch]

    def describe(self) -> None:
        """Fill in the figures that are not timed; raises AssertionError if a case does not do what it claims."""

    def step(self, case: Case, batch: Batch, lap: Laps) -> None:
        """Run once, and call ``lap`` with the name of each measure that ends."""

    def parts(self, case: Case) -> Parts:
        """Methods to be timed as stages."""


def measure(host: Host, rounds: int, stages: bool) -> None:
    """Fill in the figures of all cases: every case runs on every batch in every round.

    Memory is measured while warming up, and stages in half as many runs of their own: watching slows a run down.
    """
    host.describe()
    for batch in host.batches:  # warms up
        for case in host.cases:
            peak = peak_bytes(lambda: _timed(host, case, batch), host.device)  # noqa: B023
            case.peak_bytes = max(case.peak_bytes, peak)
    for _ in _progress(range(rounds), "timing"):
        for case in host.cases:
            for name in host.measures:
                case.seconds.setdefault(name, []).append([])
        for batch in host.batches:
            for case in host.cases:
                for name, seconds in _timed(host, case, batch).items():
                    case.seconds[name][-1].append(seconds)
    for _ in _progress(range((rounds + 1) // 2 if stages else 0), "stages"):
        for batch in host.batches:
            for case in host.cases:
                with Stopwatch(host.parts(case), host.device) as watch:
                    *_, total = _timed(host, case, batch).values()
                case.stages.append({**watch.seconds, "rest": total - sum(watch.seconds.values())})


def ratios(case: Case, reference: Case, name: str) -> list[float]:
    """Reference time / case time, pair by pair."""
    pairs = zip(reference.seconds[name], case.seconds[name])
    return [slow / fast for slows, fasts in pairs for slow, fast in zip(slows, fasts)]


def _timed(host: Host, case: Case, batch: Batch) -> dict[str, float]:
    lap = Laps(host.device)
    host.step(case, batch, lap)
    return lap.seconds


def _progress(rounds: range, description: str):
    return track(rounds, description=description, disable=not sys.stderr.isatty())
