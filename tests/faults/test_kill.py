"""`kill -9` at random moments, a full disk, and two processes on one folder: the same command ends with the same bytes.

`KILLS=20` kills each command 20 times.
"""

import json
import os
import random
import shutil
import signal
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="the extra train is not installed")
import forks
import numpy as np
from hub_clients import become_client
from loopback_hub import LoopbackHub
from PIL import Image
from safetensors.torch import load_file
from train_fixtures import command

from sdllava.analysis.images import open_images
from sdllava.analysis.loading import load_analysis_model
from sdllava.analysis.sweep import select_features, write_sweep
from sdllava.atomic_files import NotWrittenError
from sdllava.evaluation.evaluate import EvaluationOptions, evaluate
from sdllava.hub.push import push_folder
from sdllava.run_records import is_lock, locked
from sdllava.train import run as train_run

pytestmark = pytest.mark.slow

EARLIER = Path(__file__).parents[1] / "data" / "earlier-version"
KILLS = int(os.environ.get("KILLS", "3"))
FULL = {"max_steps": 6, "save_steps": 2, "per_device_train_batch_size": 3, "prompt_dropout": 0.5}
LORA = {**FULL, "lora_r": 4, "unet_lora_r": 2, "lora_dropout": 0.3}
Work = Callable[[Path], object]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for i in range(9):
        Image.fromarray(generator.integers(255, size=(20 + 3 * i, 30, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def works(work, published, images, loaded, mmvp_folder) -> dict[str, Work]:
    """What each command does, as a function of its output folder."""
    model = load_analysis_model(str(published["sd2"]))
    selection = select_features(model, True, ["D-L2-R0-B0-Cross-Q", "U-L1-R1-B0-Out"], [10, 500], [0, 4])
    options = EvaluationOptions(data=str(mmvp_folder), batch_size=1)

    def train(output: Path, **settings: object) -> None:
        train_run.train(command(work, str(output), init_from=work / "trained", **settings))

    def cache(output: Path) -> None:
        train_run.write_cache = partial(train_run.write_cache, shard_bytes=1)  # one shard per batch
        train_run.cache(command(work, "unused", init_from=work / "trained"), str(output), "conditional", "float32", 2)

    return {
        "train": partial(train, **FULL),
        "train-lora": partial(train, **LORA),
        "cache": cache,
        "evaluate": lambda output: evaluate(loaded, "mmvp", output, options),
        "sweep": lambda output: write_sweep(
            model, open_images([str(images)], question="a dog"), selection, output, batch_size=2
        ),
    }


def files(folder: Path) -> dict[str, bytes]:
    """The results of a command: the final weights of a training run, every file of the others."""
    weights = [path for name in ("model", "adapter_model") for path in folder.glob(f"{name}.safetensors")]
    found = weights or [path for path in folder.iterdir() if not is_lock(path)]
    return {path.name: path.read_bytes() for path in found}


def assert_whole(folder: Path) -> None:
    """No file that a later command reads is half-written."""
    for path in folder.rglob("*"):
        if not any(part.startswith(".") for part in path.relative_to(folder).parts):
            if path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".safetensors":
                assert load_file(path)


@pytest.mark.parametrize("name", ["train", "train-lora", "cache", "evaluate", "sweep"])
def test_a_killed_command_ends_with_the_bytes_of_an_undisturbed_one(works, name, tmp_path):
    source, log, kills = random.Random(name), tmp_path / "log", 0
    seconds = forks.run(partial(works[name], tmp_path / "whole"), log)
    expected = files(tmp_path / "whole")
    for _ in range(KILLS * 3):
        output = tmp_path / "killed"
        if forks.kill(partial(works[name], output), log, seconds, source) < 0:
            continue  # it ended before
        assert_whole(output)
        forks.run(partial(works[name], output), log)
        assert files(output) == expected
        shutil.rmtree(output)
        if (kills := kills + 1) == KILLS:
            break
    assert kills


def push(hub: LoopbackHub, home: Path) -> None:
    """Push a checkpoint to tester/model, in a process of its own."""
    become_client(hub, home)
    push_folder(EARLIER, "tester/model")


def test_a_killed_push_leaves_the_repository_empty_or_whole_and_completes(tmp_path):
    source, log, kills = random.Random("push"), tmp_path / "log", 0
    with LoopbackHub().running() as hub:
        seconds = forks.run(partial(push, hub, tmp_path), log)
        expected = hub.files("tester/model")
    for _ in range(KILLS * 3):
        with LoopbackHub().running() as hub:
            if forks.kill(partial(push, hub, tmp_path), log, seconds, source) < 0:
                continue  # it ended before
            repository = hub.repositories.get("tester/model")
            assert repository is None or hub.files("tester/model") in ({}, expected)
            forks.run(partial(push, hub, tmp_path), log)
            assert hub.files("tester/model") == expected
        if (kills := kills + 1) == KILLS:
            break
    assert kills


@pytest.mark.parametrize("name", ["train", "cache", "evaluate", "sweep"])
def test_a_full_disk_ends_in_one_error_and_the_command_completes_when_there_is_room(works, name, tmp_path):
    """A limit of the size of files stands for the full disk: below the weights, above the records."""
    limit = {"train": 20_000, "cache": 1_000, "evaluate": 300, "sweep": 5_000}[name]
    output, log = tmp_path / "out", tmp_path / "log"
    assert forks.end(forks.start(partial(works[name], output), log, limit)) == 1
    assert "NotWrittenError" in log.read_text().strip().splitlines()[-1], log.read_text()[-3000:]
    assert_whole(output)
    assert not [path for path in output.iterdir() if path.name.startswith(".unfinished")]
    forks.run(partial(works[name], output), log)
    forks.run(partial(works[name], tmp_path / "whole"), log)
    assert files(output) == files(tmp_path / "whole")


def test_a_full_disk_leaves_the_last_checkpoint_of_training_whole(work, tmp_path):
    def train(steps: int) -> None:
        settings = {**FULL, "max_steps": steps, "lr_scheduler_type": "constant"}
        train_run.train(command(work, str(tmp_path / "out"), init_from=work / "trained", **settings))

    forks.run(partial(train, 2), tmp_path / "log")
    before = {path: path.read_bytes() for path in (tmp_path / "out" / "checkpoint-2").rglob("*") if path.is_file()}
    assert forks.end(forks.start(partial(train, 4), tmp_path / "log", 20_000)) == 1
    assert "NotWrittenError" in (tmp_path / "log").read_text().strip().splitlines()[-1]
    assert {path: path.read_bytes() for path in before} == before
    forks.run(partial(train, 4), tmp_path / "log")
    assert (tmp_path / "out" / "checkpoint-4").is_dir()


@pytest.mark.parametrize("name", ["train", "cache", "evaluate", "sweep"])
def test_a_read_only_folder_raises_one_error(works, name):
    if not os.path.isdir("/sys"):
        pytest.skip("no read-only folder is known here")
    with pytest.raises(NotWrittenError, match=r"could not be written: .*choose another place"):
        works[name](Path("/sys/sdllava-output"))


@pytest.mark.parametrize("name", ["train", "cache", "evaluate", "sweep"])
def test_a_second_process_raises_until_the_first_one_is_killed(works, name, tmp_path):
    def hold() -> None:
        with locked(tmp_path / "out"):
            time.sleep(600)

    pid = forks.start(hold, tmp_path / "log")
    owner = tmp_path / "out" / ".owner-0"
    while not (owner.exists() and owner.read_text()):
        time.sleep(0.01)
    try:
        with pytest.raises(BlockingIOError, match=f"in use by process {pid} on {socket.gethostname()}"):
            works[name](tmp_path / "out")
    finally:
        os.kill(pid, signal.SIGKILL)
        forks.end(pid)
    with locked(tmp_path / "out"):
        pass
