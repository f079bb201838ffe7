"""FSDP2 on two CPU processes. accelerate shards on accelerators only, so torch's `fully_shard` is called directly."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
from ranks import run_ranks
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from train_and_die import die
from train_fixtures import model_arguments

from sdllava import SDLlavaForConditionalGeneration
from sdllava.data.sources import DataSource, load_data
from sdllava.evaluation.processes import process_state
from sdllava.train.build import build_model, build_processor, read_source
from sdllava.train.collator import SDLlavaCollator

STEPS, BATCH = 3, 4


def train(work: Path, name: str, killed_after: int | None = None) -> None:
    """Three steps of AdamW, sharded where there are several processes. Writes losses and the whole model.

    With several processes every step is saved, and a killed run resumes.
    """
    state = process_state()
    arguments = model_arguments(work)
    torch.manual_seed(0)
    model = build_model(read_source(arguments)).train()
    if state.num_processes > 1:
        mesh = init_device_mesh("cpu", (state.num_processes,))
        for layer in model.model.language_model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    rows = load_data([DataSource(str(work / "data" / "colours.json"))])
    collator = SDLlavaCollator(build_processor(read_source(arguments)), seed=0)
    saved = work / f"{name}-state"
    losses = resume(model, optimizer, saved) if saved.exists() else []
    first = len(losses)
    for step in range(first, STEPS):
        own = range(state.process_index, BATCH, state.num_processes)
        loss = model(**collator([rows[(BATCH * step + i) % len(rows)] for i in own])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(mean(loss.detach())))
        if state.num_processes > 1:
            checkpoint.save(state_of(model, optimizer, losses), checkpoint_id=saved)
        if step + 1 == killed_after:
            die()
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if state.is_main_process:
        model = build_model(read_source(arguments))
        model.load_state_dict(whole)
        model.save_pretrained(work / name)
        (work / name / "losses.json").write_text(json.dumps({"first": first, "losses": losses}))


def state_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer, losses: list[float]) -> dict[str, Any]:
    parameters, moments = get_state_dict(model, optimizer)
    return {
        "parameters": parameters,
        "moments": moments,
        "losses": torch.tensor(losses + [0.0] * (STEPS - len(losses))),
    }


def resume(model: torch.nn.Module, optimizer: torch.optim.Optimizer, saved: Path) -> list[float]:
    """The losses until then."""
    state = state_of(model, optimizer, [])
    checkpoint.load(state, checkpoint_id=saved)
    set_state_dict(model, optimizer, model_state_dict=state["parameters"], optim_state_dict=state["moments"])
    return [loss for loss in state["losses"].tolist() if loss]


def mean(loss: torch.Tensor) -> torch.Tensor:
    """Over the processes, whose answers have equal numbers of tokens."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(loss)
        loss /= torch.distributed.get_world_size()
    return loss


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_losses_of_one_process_and_the_saved_folder_loads(work):
    forks.run(partial(train, work, "one"), work / "one.log")
    with pytest.raises(AssertionError):
        run_ranks(partial(train, work, "sharded", killed_after=2), work)
    assert not (work / "sharded").exists()
    run_ranks(partial(train, work, "sharded"), work)
    expected, found = (json.loads((work / name / "losses.json").read_text()) for name in ("one", "sharded"))
    assert (expected["first"], found["first"]) == (0, 2)
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-5)
    model, report = SDLlavaForConditionalGeneration.from_pretrained(work / "sharded", output_loading_info=True)
    assert not report["missing_keys"]
    assert model.generate(torch.tensor([[1, 5]]), max_new_tokens=2, min_new_tokens=2).shape == (1, 4)
