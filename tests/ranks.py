"""Runs a function in processes that form a group, as under `torchrun` on a CPU, without importing torch in each."""

import os
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

import forks
from accelerate.state import AcceleratorState, GradientState, PartialState


def run_ranks(work: Callable[[], object], logs: Path, count: int = 2) -> None:
    """Run `work` in forked processes and wait for them.

    Args:
        work: What every process runs.
        logs: The folder that gets the output of each process, `rank-0` and so on.
        count: The number of processes.

    Raises:
        AssertionError: A process failed. The message is the end of its output.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    group |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(count))
    started = [forks.start(partial(_run_rank, work, rank, group), logs / f"rank-{rank}") for rank in range(count)]
    statuses = [forks.end(process) for process in started]
    assert statuses == [0] * count, "\n".join((logs / f"rank-{rank}").read_text()[-3000:] for rank in range(count))


def _run_rank(work: Callable[[], object], rank: int, group: dict[str, str]) -> None:
    from sdllava.evaluation.processes import leave_group

    os.environ |= {**group, "RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"}
    for state in (PartialState, AcceleratorState, GradientState):
        state._reset_state()  # of the process that was forked
    work()
    leave_group()
