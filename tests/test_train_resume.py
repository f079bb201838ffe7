"""A stopped run resumes bit by bit as if it had not been stopped, and a kill within a save leaves no checkpoint."""

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import forks
import pytest
import torch
from train_and_die import train_and_die
from train_fixtures import command, losses, weights
from transformers import Trainer

from sdllava.atomic_files import move_into_place
from sdllava.train import trainer
from sdllava.train.run import checkpoint_to_resume, parse_run, run_settings, train
from sdllava.train.trainer import UNFINISHED, EpochSampler, SDLlavaTrainer

RANDOM = {"prompt_dropout": 0.5, "max_steps": 6, "save_steps": 2, "per_device_train_batch_size": 3}
LORA = {"lora_r": 4, "unet_lora_r": 2, "lora_dropout": 0.3}
STREAMING = {"streaming": "true", "shuffle_buffer": 5}
ADAPTER = "adapter_model.safetensors"


class StoppedError(Exception):
    pass


@pytest.fixture
def stop(monkeypatch):
    """Makes training raise after a number of steps, once."""

    def after(steps: int) -> None:
        whole_step, done = SDLlavaTrainer.training_step, []

        def step(*args, **kwargs):
            if len(done) == steps:
                monkeypatch.undo()
                raise StoppedError
            done.append(None)
            return whole_step(*args, **kwargs)

        monkeypatch.setattr(SDLlavaTrainer, "training_step", step)

    return after


def kill(arguments: list[str], die: str, log: Path) -> None:
    """Train in a forked process that kills itself."""
    assert forks.end(forks.start(partial(train_and_die, die, arguments), log)) == -signal.SIGKILL, log.read_text()


def kill_new_process(arguments: list[str], die: str, log: Path) -> None:
    """The same where nothing has registered the model yet."""
    script = Path(__file__).with_name("train_and_die.py")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with log.open("wb") as output:
        result = subprocess.run(
            [sys.executable, script, die, *arguments], stdout=output, stderr=output, env=environment
        )
    assert result.returncode == -signal.SIGKILL, log.read_text()[-3000:]


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def assert_bitwise_equal(folder: Path, whole: Path, name: str = "model.safetensors") -> None:
    assert losses(folder, 6) == losses(whole, 6)
    expected, found = weights(whole, name), weights(folder, name)
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())


def whole_run(work: Path, name: str, **settings) -> Path:
    folder = work / f"whole-{name}"
    if not folder.exists():
        train(command(work, folder.name, **settings))
    return folder


@pytest.mark.parametrize(
    ("name", "steps", "settings", "file"),
    [
        ("plain", 3, {}, "model.safetensors"),
        pytest.param(
            "unet-lora", 3, {"unet_lora_r": 2, "lora_dropout": 0.3}, "model.safetensors", marks=pytest.mark.slow
        ),
        pytest.param("plain", 4, {}, "model.safetensors", marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_resumes(work, stop, name, steps, settings, file):
    """Three steps are within the second epoch, four right after a checkpoint."""
    settings = {**RANDOM, "init_from": work / "trained", **settings}
    whole = whole_run(work, name, **settings)
    arguments = command(work, f"stopped-{name}-{steps}", **settings)
    folder = work / f"stopped-{name}-{steps}"
    stop(steps)
    with pytest.raises(StoppedError):
        train(arguments)
    assert checkpoints(folder) == ["checkpoint-2", "checkpoint-4"][: steps // 2]
    train(arguments)
    assert_bitwise_equal(folder, whole, file)
    assert not (folder / UNFINISHED).exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "killed", "die", "settings", "last", "file"),
    [
        ("plain", kill_new_process, "save:4", {}, "checkpoint-2", "model.safetensors"),
        ("stream", kill, "step:5", STREAMING, "checkpoint-4", "model.safetensors"),
        ("lora", kill, "step:3", LORA, "checkpoint-2", ADAPTER),
    ],
)
def test_a_killed_run_resumes(work, name, killed, die, settings, last, file):
    """Within a save; while streaming, over the end of the data and shuffled; with LoRA on both models."""
    settings = {**RANDOM, "init_from": work / "trained", **settings}
    whole = whole_run(work, name, **settings)
    folder = work / f"killed-{name}"
    arguments = command(work, folder.name, **settings)
    killed(arguments, die, work / f"{name}.log")
    assert checkpoints(folder)[-1] == last
    assert (folder / UNFINISHED).exists() == die.startswith("save")
    train(arguments)
    assert_bitwise_equal(folder, whole, file)
    assert not (folder / UNFINISHED).exists()


def test_a_stop_within_a_save_leaves_no_checkpoint(work, monkeypatch):
    def stopped(self, output_dir):
        assert Path(output_dir, "model.safetensors").is_file()
        raise StoppedError

    monkeypatch.setattr(SDLlavaTrainer, "_save_optimizer_and_scheduler", stopped)
    with pytest.raises(StoppedError):
        train(command(work, "stopped-save", init_from=work / "trained", max_steps=1, save_steps=1))
    assert checkpoints(work / "stopped-save") == []
    assert not (work / "stopped-save" / UNFINISHED).exists()


def test_other_settings_raise(work):
    folder = work / "settings"
    (folder / "checkpoint-1").mkdir(parents=True)
    shutil.copy(work / "trained" / "run.json", folder)
    with pytest.raises(ValueError, match=r"learning_rate is 0\.01 there and 0\.1 here"):
        train(command(work, "settings", learning_rate=0.1))


def test_the_limit_of_bad_samples_may_change_and_earlier_records_may_lack_a_setting(work):
    folder = work / "limit"
    (folder / "checkpoint-1").mkdir(parents=True)
    record = run_settings(parse_run(command(work, "limit")))
    del record["weight_decay"]
    (folder / "run.json").write_text(json.dumps(record | {"max_bad_samples": 0.5}))
    flags = {"max_bad_samples": 0.1, "bad_samples": "skip"}
    assert checkpoint_to_resume(parse_run(command(work, "limit", **flags))) == str(folder / "checkpoint-1")
    with pytest.raises(ValueError, match="lr_scheduler_type is 'linear' there and 'cosine' here"):
        checkpoint_to_resume(parse_run(command(work, "limit", **flags, lr_scheduler_type="cosine")))


def test_only_the_first_process_reads_the_record_of_a_run_without_a_checkpoint(work, monkeypatch):
    run = parse_run(command(work, "fresh"))
    (work / "fresh").mkdir()
    (work / "fresh" / "run.json").write_text(json.dumps(run_settings(run) | {"learning_rate": 1.0}))
    monkeypatch.setattr(type(run.training), "should_save", False)
    assert checkpoint_to_resume(run) is None
    monkeypatch.setattr(type(run.training), "should_save", True)
    assert checkpoint_to_resume(run) is None
    assert json.loads((work / "fresh" / "run.json").read_text())["learning_rate"] == 5e-3


def test_batches_grouped_by_length_depend_on_seed_and_epoch():
    lengths = [i % 7 for i in range(32)]
    orders = {}
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        sampler = EpochSampler(8, lengths, seed)
        sampler.set_epoch(epoch)
        orders[seed, epoch] = list(sampler)
        torch.rand(3)
        assert list(sampler) == orders[seed, epoch]
        assert sorted(orders[seed, epoch]) == list(range(32))
    assert len({tuple(order) for order in orders.values()}) == 3


def test_a_replaced_checkpoint_is_never_there_in_part(tmp_path, monkeypatch):
    for name in ("checkpoint-2", "new"):
        (tmp_path / name).mkdir()
        for file in ("a", "b"):
            (tmp_path / name / file).write_text(name)

    def killed(folder, **options):
        next(Path(folder).iterdir()).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        move_into_place(tmp_path / "new", tmp_path / "checkpoint-2")
    assert {path.name: path.read_text() for path in (tmp_path / "checkpoint-2").iterdir()} == {"a": "new", "b": "new"}


def test_checkpoints_rotate_name_the_best_and_are_pushed_when_complete(work, monkeypatch):
    """In a folder of an earlier run without checkpoints: settings and model are replaced, other files are kept."""
    folder, pushed = work / "best", []
    folder.mkdir()
    for name, text in {"run.json": '{"learning_rate": 7}', "model.safetensors": "old", "notes.txt": "old"}.items():
        (folder / name).write_text(text)

    def push(pushed_folder, repo_id, **options):
        pushed.append(Path(pushed_folder).relative_to(work))
        assert weights(Path(pushed_folder))
        if len(pushed) == 2:
            raise ConnectionError("no network")

    monkeypatch.setattr(trainer, "push_folder", push)
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self: None)
    flags = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "save_total_limit": 1, "max_steps": 3}
    flags |= {"load_best_model_at_end": "true", "push_to_hub": "true", "learning_rate": None}
    flags["init_from"] = work / "trained"
    recipe = work / "eval.yaml"
    recipe.write_text(f"eval_datasets: [{{path: {work}/data/colours.json}}]\nlearning_rate: 10.0\n")
    train(["--config", str(recipe), *command(work, "best", **flags)])
    assert json.loads((folder / "run.json").read_text())["learning_rate"] == 10.0
    assert weights(folder)
    assert (folder / "notes.txt").read_text() == "old"
    assert not (folder / UNFINISHED).exists()
    found = sorted(folder.glob("checkpoint-*"))
    state = json.loads((found[-1] / "trainer_state.json").read_text())
    best = Path(state["best_model_checkpoint"])
    assert best.parent == folder
    assert best in found
    assert len(found) == (1 if best == found[-1] else 2)
    assert [str(path) for path in pushed] == [*(f"best/checkpoint-{step}" for step in (1, 2, 3)), "best"]
