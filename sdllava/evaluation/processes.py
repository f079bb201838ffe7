"""The processes of a run under `accelerate launch` or torchrun."""

import os
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env

T = TypeVar("T")


def process_state() -> PartialState:
    """This process's rank and device. Machines without an accelerator communicate over gloo."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or (several and not torch.accelerator.is_available())
    return PartialState(cpu=cpu)


def default_device() -> torch.device:
    """This process's accelerator, or the CPU."""
    return process_state().device


def gather_records(records: list[dict], order: dict[str, int]) -> list[dict] | None:
    """The records of all processes, sorted, on the main process. None on the others.

    Args:
        records: Those of this process.
        order: Record id -> position.
    """
    state = process_state()
    if state.num_processes > 1:
        records = gather_object(records)
        if not state.is_main_process:
            return None
    return sorted(records, key=lambda record: order[record["id"]])


def broadcast(value: T | None) -> T:
    """The main process's value, on every process. Other processes pass None."""
    values = [value]
    if process_state().num_processes > 1:
        broadcast_object_list(values)
    (result,) = values
    assert result is not None
    return result


def leave_group() -> None:
    """Leave the process group, so that this process exits cleanly while others still work."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
