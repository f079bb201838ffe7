"""DeepSpeed on two CPU processes: losses of one process, resuming, folders that load. `make test-deepspeed` runs it."""

import json
import os
from functools import partial

import forks
import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from train_and_die import train_and_die
from train_fixtures import command, losses, weights, write_colours

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("DEEPSPEED_TIMEOUT", "5")  # minutes
pytest.importorskip("deepspeed", reason="the extra deepspeed is not installed")
pytestmark = pytest.mark.slow

FLAGS = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-3}
STAGES = pytest.mark.parametrize("stage", [2, 3])


def train(arguments):
    from sdllava.train.run import train

    train(arguments)


def with_deepspeed(work):
    """Run a function in a rank. accelerate ignores DeepSpeed where this variable is set, as `ranks.py` does."""
    os.environ.pop("ACCELERATE_USE_CPU")
    work()


def two_processes(work, output, stage, **flags):
    """The arguments of a run on two processes."""
    config = work / f"zero{stage}.json"
    zero = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
    sizes = dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto")
    settings = {"zero_optimization": zero, "zero_allow_untested_optimizer": True, "bf16": {"enabled": "auto"}, **sizes}
    config.write_text(json.dumps(settings))
    data = work / "eight" / "colours.json"
    return command(work, output, train_data=data, per_device_train_batch_size=2, deepspeed=config, **FLAGS, **flags)


@pytest.fixture(scope="module", autouse=True)
def one_process(work):
    """A run on eight samples, so that two epochs are four batches of four for any number of processes."""
    data = write_colours(work / "eight", n=8)
    arguments = command(work, "one", train_data=data, per_device_train_batch_size=4, **FLAGS)
    forks.run(partial(train, arguments), work / "one.log")
    return work / "one"


@STAGES
def test_a_killed_run_resumes_to_the_losses_and_the_folder_of_one_process(work, one_process, stage):
    from sdllava import SDLlavaForConditionalGeneration

    arguments = two_processes(work, f"zero{stage}", stage)
    with pytest.raises(AssertionError):
        run_ranks(partial(with_deepspeed, partial(train_and_die, "step:3", arguments)), work)
    folder = work / f"zero{stage}"
    assert list(folder.glob("checkpoint-2/global_step2/*zero_pp_rank_1*")), "DeepSpeed did not write the checkpoint"
    run_ranks(partial(with_deepspeed, partial(train, arguments)), work)
    assert losses(folder) == pytest.approx(losses(one_process), abs=1e-4)
    expected, found = weights(one_process), weights(folder)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-2, rtol=0, msg=name)  # Adam makes steps of rounding
    model, report = SDLlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert model.generate(torch.tensor([[1, 5]]), max_new_tokens=2, min_new_tokens=2).shape == (1, 4)


@STAGES
def test_half_precision_keeps_the_vae_in_float32(work, stage):
    arguments = two_processes(work, f"half{stage}", stage, bf16="true", dtype="bfloat16")
    run_ranks(partial(with_deepspeed, partial(train, arguments)), work)
    found = weights(work / f"half{stage}")
    assert found["lm_head.weight"].dtype == torch.bfloat16
    vae = load_file(work / "sd2" / "vae" / "diffusion_pytorch_model.safetensors")
    held = {name.partition(".vae.")[2]: tensor for name, tensor in found.items() if ".vae." in name}
    assert held
    assert all(torch.equal(tensor, vae[name]) for name, tensor in held.items())


@STAGES
def test_lora_in_the_unet_is_merged_by_the_command_that_the_run_prints(work, capfd, stage):
    from sdllava import SDLlavaForConditionalGeneration
    from sdllava.train.adapters import merge

    folder = work / f"lora{stage}"
    arguments = two_processes(work, folder.name, stage, unet_lora_r=2, unet_lora_alpha=4)
    run_ranks(partial(with_deepspeed, partial(train, arguments)), work)
    assert f"sdllava merge {folder} {folder}-merged" in capfd.readouterr().out
    merge(str(folder), f"{folder}-merged")
    _, report = SDLlavaForConditionalGeneration.from_pretrained(f"{folder}-merged", output_loading_info=True)
    assert not report["missing_keys"]
