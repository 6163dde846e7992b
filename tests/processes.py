"""Tests in several processes, forked from one that has imported everything: that takes longer than most tests."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

fork = multiprocessing.get_context("forkserver")
_modules = []


def preload(*modules: str) -> None:
    """Have modules imported before processes are forked."""
    _modules.extend(modules)
    fork.set_forkserver_preload(_modules)


def environments(number: int) -> Iterator[dict[str, str]]:
    """What a launcher tells each of its processes on one machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for rank in map(str, range(number)):
        sizes = {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number), "OMP_NUM_THREADS": "1"}
        yield {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank, **sizes}


def start_ranks(number: int, folder: Path, work: Callable, *arguments) -> list[BaseProcess]:
    """Processes that each save what ``work(rank, *arguments)`` returns; none restarts or ends another."""
    folder.mkdir(parents=True, exist_ok=True)
    ranks = list(enumerate(environments(number)))
    processes = [fork.Process(target=_work, args=(rank, env, folder, work, arguments)) for rank, env in ranks]
    for process in processes:
        process.start()
    return processes


def run_ranks(number: int, folder: Path, work: Callable, *arguments) -> list:
    """What ``work(rank, *arguments)`` returns in each of some processes."""
    codes = [end(process) for process in start_ranks(number, folder, work, *arguments)]
    assert not any(codes), "\n".join(log.read_text() for log in folder.glob("*.log"))
    return [torch.load(folder / f"{rank}.pth") for rank in range(number)]


def end(process: BaseProcess, timeout: float = 100) -> int:
    process.join(timeout)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def _work(rank: int, environment: dict, folder: Path, work: Callable, arguments: tuple) -> None:
    sys.stdout = sys.stderr = (folder / f"{rank}.log").open("w", buffering=1)
    os.environ.update(environment)
    torch.set_num_threads(1)
    torch.save(work(rank, *arguments), folder / f"{rank}.pth")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
