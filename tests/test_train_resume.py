"""A run that was killed goes on bit by bit as if it had not been, and a kill within a save leaves no checkpoint."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from train_fixtures import command, losses, weights, write_colours, write_parts

from sdllava.train.run import train
from sdllava.train.trainer import ASIDE, move_files_into_place, move_into_place

RANDOM = {"prompt_dropout": 0.5, "max_steps": 6, "save_steps": 2, "per_device_train_batch_size": 3}


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("work")
    write_parts(root)
    write_colours(root / "data")
    return root


def killed(arguments: list[str], die: str) -> None:
    script = Path(__file__).with_name("train_and_die.py")
    environment = {**os.environ, "DIE": die, "PYTHONPATH": str(Path(__file__).parents[1])}
    result = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, env=environment)
    assert result.returncode == -9, result.stderr[-3000:]


def assert_bitwise_equal(folder: Path, whole: Path, name: str = "model.safetensors") -> None:
    assert losses(folder, 6) == losses(whole, 6)
    expected, found = weights(whole, name), weights(folder, name)
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())


@pytest.mark.slow
@pytest.mark.parametrize("die", ["step:3", "save:4", "step:4"])
def test_killed_and_started_again(work, die):
    if not (work / "whole").exists():
        train(command(work, "whole", **RANDOM))
    name = f"killed-{die.replace(':', '-')}"
    arguments = command(work, name, **RANDOM)
    killed(arguments, die)
    assert [path.name for path in (work / name).glob("checkpoint-*")] == ["checkpoint-2"]
    assert (work / name / ASIDE).exists() == (die == "save:4")
    train(arguments)
    assert_bitwise_equal(work / name, work / "whole")
    assert not (work / name / ASIDE).exists()


@pytest.mark.slow
def test_killed_while_streaming(work):
    """Over the end of the data, and shuffled."""
    settings = {**RANDOM, "streaming": "true", "shuffle_buffer": 5}
    train(command(work, "whole-stream", **settings))
    arguments = command(work, "killed-stream", **settings)
    killed(arguments, "step:5")
    assert [path.name for path in sorted((work / "killed-stream").glob("checkpoint-*"))][-1] == "checkpoint-4"
    train(arguments)
    assert_bitwise_equal(work / "killed-stream", work / "whole-stream")


@pytest.mark.slow
@pytest.mark.parametrize("lora", [{"lora_r": 4, "lora_dropout": 0.3}, {"unet_lora_r": 2, "lora_dropout": 0.3}])
def test_killed_with_lora(work, lora):
    if not (work / "base" / "model.safetensors").exists():
        train(command(work, "base", max_steps=1, save_strategy="no"))
    kind = next(iter(lora))
    settings = {**RANDOM, **lora, "init_from": work / "base"}
    train(command(work, f"whole-{kind}", **settings))
    arguments = command(work, f"killed-{kind}", **settings)
    killed(arguments, "step:3")
    train(arguments)
    file = "adapter_model.safetensors" if kind == "lora_r" else "model.safetensors"
    assert_bitwise_equal(work / f"killed-{kind}", work / f"whole-{kind}", file)


def test_other_settings_are_refused(work):
    train(command(work, "settings", max_steps=1, save_steps=1))
    with pytest.raises(ValueError, match=r"its learning_rate is 0\.005, the run's is 0\.1"):
        train(command(work, "settings", max_steps=1, save_steps=1, learning_rate=0.1))


def test_folders_are_moved_whole(tmp_path):
    for name, text in (("new", "new"), ("old", "old")):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "a").write_text(text)
    (tmp_path / "old" / "kept").write_text("kept")
    move_files_into_place(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old" / "sub" / "a").read_text() == "new"
    assert (tmp_path / "old" / "kept").read_text() == "kept"
    assert not (tmp_path / "new").exists()
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "b").write_text("b")
    move_into_place(tmp_path / "new", tmp_path / "old")
    assert [path.name for path in (tmp_path / "old").iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


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


def test_checkpoints_rotate_and_name_the_best(work):
    flags = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "save_total_limit": 1, "max_steps": 3}
    recipe = work / "eval.yaml"
    recipe.write_text(
        f"eval_datasets: [{{path: {work}/data/colours.json}}]\nn_sample_answers: 2\nlearning_rate: 10.0\n"
    )
    train(["--config", str(recipe), *command(work, "best", load_best_model_at_end="true", learning_rate=None, **flags)])
    checkpoints = sorted((work / "best").glob("checkpoint-*"))
    state = json.loads((checkpoints[-1] / "trainer_state.json").read_text())
    best = Path(state["best_model_checkpoint"])
    assert best.parent == work / "best"
    assert best in checkpoints
    assert len(checkpoints) == (1 if best == checkpoints[-1] else 2)
