"""DeepSpeed on two CPU processes: losses of one process, folders that load. `make test-deepspeed` runs it."""

import json
import os
import subprocess
import sys

import pytest
from train_fixtures import command, losses

pytest.importorskip("deepspeed", reason="the extra deepspeed is not installed")
pytestmark = pytest.mark.slow

ENVIRONMENT = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
FLAGS = {"max_steps": 2, "save_steps": 2, "learning_rate": 1e-3}


def launch(processes, arguments):
    """Run the train command in its own processes. Returns what they print."""
    start = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", "0"]
    start += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    done = subprocess.run(
        [sys.executable, *start, "-m", "sdllava.train", *arguments],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def one_process(work):
    from sdllava.train.run import train

    train(command(work, "one", per_device_train_batch_size=4, **FLAGS))
    return losses(work / "one", 2)


@pytest.mark.parametrize(("stage", "flags"), [(2, {}), (3, {}), (2, {"unet_lora_r": 2, "unet_lora_alpha": 4})])
def test_losses_of_two_processes_equal_those_of_one(work, one_process, stage, flags):
    from sdllava import SDLlavaForConditionalGeneration
    from sdllava.train.adapters import merge

    config = work / f"zero{stage}.json"
    zero = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
    sizes = dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto")
    config.write_text(json.dumps({"zero_optimization": zero, "zero_allow_untested_optimizer": True, **sizes}))
    output = f"zero{stage}-{len(flags)}"
    printed = launch(2, command(work, output, per_device_train_batch_size=2, deepspeed=config, **FLAGS, **flags))
    found = losses(work / output, 2)
    assert found[0] == pytest.approx(one_process[0], abs=1e-4)
    folder = work / output
    if flags:
        assert f"sdllava merge {folder} {folder}-merged" in printed
        merge(str(folder), f"{folder}-merged")
        folder = work / f"{output}-merged"
    else:
        assert found == pytest.approx(one_process, abs=1e-4)
    _, report = SDLlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
