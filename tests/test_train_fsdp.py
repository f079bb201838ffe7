"""FSDP2 on two CPU processes. accelerate shards on accelerators only, so torch's `fully_shard` is called directly."""

import json
from functools import partial
from pathlib import Path

import forks
import pytest
import torch
from ranks import run_ranks
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from train_fixtures import model_arguments

from sdllava import SDLlavaForConditionalGeneration
from sdllava.data.sources import DataSource, load_data
from sdllava.evaluation.processes import process_state
from sdllava.train.arguments import AdapterArguments
from sdllava.train.build import build_model, build_processor
from sdllava.train.collator import SDLlavaCollator

STEPS, BATCH = 3, 4


def train(work: Path, name: str) -> None:
    """Three steps of AdamW, sharded where there are several processes. Writes losses and the whole model."""
    state = process_state()
    arguments = model_arguments(work)
    torch.manual_seed(0)
    model = build_model(arguments, AdapterArguments()).train()
    if state.num_processes > 1:
        mesh = init_device_mesh("cpu", (state.num_processes,))
        for layer in model.model.language_model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    rows = load_data([DataSource(str(work / "data" / "colours.json"))])
    collator, losses = SDLlavaCollator(build_processor(arguments), seed=0), []
    for step in range(STEPS):
        own = range(state.process_index, BATCH, state.num_processes)
        loss = model(**collator([rows[(BATCH * step + i) % len(rows)] for i in own])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(mean(loss.detach())))
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if state.is_main_process:
        model = build_model(arguments, AdapterArguments())
        model.load_state_dict(whole)
        model.save_pretrained(work / name)
        (work / name / "losses.json").write_text(json.dumps(losses))


def mean(loss: torch.Tensor) -> torch.Tensor:
    """Over the processes, whose answers have equal numbers of tokens."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(loss)
        loss /= torch.distributed.get_world_size()
    return loss


@pytest.mark.slow
def test_losses_equal_one_process_and_the_saved_folder_loads(work):
    forks.run(partial(train, work, "one"), work / "one.log")
    run_ranks(partial(train, work, "sharded"), work)
    expected, found = (json.loads((work / name / "losses.json").read_text()) for name in ("one", "sharded"))
    assert found == pytest.approx(expected, abs=1e-5)
    model, report = SDLlavaForConditionalGeneration.from_pretrained(work / "sharded", output_loading_info=True)
    assert not report["missing_keys"]
    assert model.generate(torch.tensor([[1, 5]]), max_new_tokens=2, min_new_tokens=2).shape == (1, 4)
