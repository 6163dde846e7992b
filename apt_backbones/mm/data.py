"""Data sets that survive damaged files, and whose random augmentation a resumed run repeats."""

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.registry import DATA_SAMPLERS, DATASETS
from torch.utils.data import Dataset, Sampler


class BadData(ValueError):
    """Damaged data; the message names the files. A worker process's traceback is left out of it."""

    def __init__(self, message: str):
        super().__init__(message.rpartition("BadData: ")[2].strip())


@DATASETS.register_module()
class GuardedDataset(Dataset):
    """A data set whose damaged items are replaced by the next good one, counted and listed, or end the run by name.
    Missing files always end it.

    With a ``PositionSampler``, the random state is set before each item is loaded, by the seed, the process and the
    item's position in the run: what augmentation draws depends neither on the number of workers nor on interruptions.

    Args:
        dataset: configuration of the data set, or the data set.
        limit: how many items may be damaged; one more ends the run.
        report: file to which a line is added for each damaged item, from all processes and runs; None for no list
            (then the first one ends the run).
        seed: of the random state.
    """

    def __init__(self, dataset: dict | Dataset, limit: int = 0, report: str | None = None, seed: int | None = None):
        self.dataset = DATASETS.build(dataset) if isinstance(dataset, dict) else dataset
        self.limit, self.report, self.seed = limit, None if report is None else Path(report), seed

    def __getattr__(self, name: str):
        if name == "dataset":  # not there yet while a pickle is read
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __setattr__(self, name: str, value: object) -> None:
        """What hooks exchange, such as the pipeline, is the data set's."""
        if name in ("dataset", "limit", "report", "seed"):
            super().__setattr__(name, value)
        else:
            setattr(self.dataset, name, value)

    def get_data_info(self, index: int | tuple[int, int]) -> dict:
        return self.dataset.get_data_info(index[0] if isinstance(index, tuple) else index)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int | tuple[int, int]) -> dict:
        if isinstance(index, tuple):
            index, position = index
            if self.seed is not None:
                seed_everything(self.seed, get_rank(), position)
        for other in range(index, index + len(self.dataset)):
            item = other % len(self.dataset)
            try:
                return self.dataset[item]
            except FileNotFoundError as error:  # the data set is not complete: no damage to live with
                raise BadData(f"no such file: {error.filename or error}") from error
            except Exception as error:
                self._note(f"{self.name_of(item)}: {' '.join(str(error).split()) or type(error).__name__}")
        raise BadData(f"no image can be read, see {self.report}")

    def name_of(self, index: int) -> str:
        """The file of an item."""
        if hasattr(self.dataset, "get_data_info"):
            return str(self.dataset.get_data_info(index).get("img_path", f"item {index}"))
        return str(self.dataset.samples[index][0]) if hasattr(self.dataset, "samples") else f"item {index}"

    def _note(self, line: str) -> None:
        if self.report is None:
            raise BadData(line)
        known = set(self.report.read_text().splitlines()) if self.report.is_file() else set()
        if line not in known:
            with open(self.report, "a") as file:  # short lines of several processes do not mix
                file.write(line + "\n")
        known.add(line)
        if len(known) > self.limit:
            shown = "; ".join(sorted(known)[:10])
            raise BadData(
                f"{len(known)} images cannot be read, more than max_bad_images={self.limit} allows: {shown}"
                f"{'; ...' if len(known) > 10 else ''} (all in {self.report})"
            )


@DATA_SAMPLERS.register_module()
class PositionSampler(Sampler):
    """Indices of another sampler together with their positions in the run.

    Args:
        sampler: configuration of the other sampler.
        dataset, seed: for it.
    """

    def __init__(self, sampler: dict, dataset: Dataset, seed: int | None = None):
        self.dataset = dataset  # mmdet's AspectRatioBatchSampler asks it for the images' sizes
        self.sampler = DATA_SAMPLERS.build(sampler, default_args=dict(dataset=dataset, seed=seed))
        self._start = 0
        if hasattr(self.sampler, "skip"):
            self.skip = self._skip  # mmengine's loops look for it when they resume

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((index, position) for position, index in enumerate(self.sampler, self._start))

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        self._start = epoch * len(self.sampler)
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def _skip(self, number: int) -> None:
        self._start = number
        self.sampler.skip(number)


def seed_everything(*numbers: int) -> None:
    """Set all random states of this process by some numbers."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
