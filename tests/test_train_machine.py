"""Recipes fit the machine and the model; unknown words are reported; the miniature is a starting point by name."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sdllava import mini_path
from sdllava.train import machine
from sdllava.train.arguments import ModelArguments
from sdllava.train.build import build_processor, read_source
from sdllava.train.check import check_data
from sdllava.train.machine import fit_to_machine, recomputes_activations
from sdllava.train.recipe_loading import chosen_arguments
from sdllava.train.run import build_collator, build_trainer, load_sources, parse_run

GPU = {"dataloader_num_workers": 8, "dtype": "bfloat16", "bf16": True, "learning_rate": 2e-5}


@pytest.mark.parametrize(("cores", "processes", "workers"), [(2, 1, 0), (4, 1, 2), (64, 1, 8), (16, 4, 2), (1, 1, 0)])
def test_workers_leave_cores_to_the_training(monkeypatch, cores, processes, workers):
    monkeypatch.setattr(machine, "available_cores", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert fit_to_machine(GPU, [])["dataloader_num_workers"] == workers
    assert fit_to_machine(GPU, ["dataloader_num_workers"])["dataloader_num_workers"] == 8
    assert "dataloader_num_workers" not in fit_to_machine({}, [])


@pytest.mark.parametrize(
    ("has_accelerator", "has_units", "expected"),
    [(True, False, ("bfloat16", True)), (False, True, ("float32", True)), (False, False, ("float32", False))],
)
def test_precision_by_machine(monkeypatch, has_accelerator, has_units, expected):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: has_accelerator)
    monkeypatch.setattr(machine, "computes_in_bfloat16", lambda device: has_units)
    fitted = fit_to_machine(GPU, [])
    assert (fitted["dtype"], fitted["bf16"]) == expected
    assert fitted["learning_rate"] == 2e-5
    assert fit_to_machine(GPU, ["bf16", "dtype"])["bf16"] is True
    assert "bf16" not in fit_to_machine({}, ["fp16"])


def test_gradient_checkpointing_by_size():
    with torch.device("meta"):
        small, large = torch.nn.Linear(10, 10), torch.nn.Linear(40_000, 40_000)
    for layer, expected in ((small, False), (large, True)):
        assert recomputes_activations(SimpleNamespace(model=SimpleNamespace(language_model=layer))) is expected


def test_what_the_user_sets_stays(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("base: own-data/full\nbf16: true\n")
    assert chosen_arguments(["--config", str(own), "--seed=3", "--lora_r", "4"]) == {
        "base", "bf16", "config", "seed", "lora_r",
    }  # fmt: skip
    assert chosen_arguments(["--config", "own-data/full"]) == {"config"}


@pytest.mark.parametrize("recipe", ["own-data/full", "silent", None])
@pytest.mark.parametrize("has_units", [False, True])
def test_a_small_model_on_a_laptop_trains_without_what_slows_it_down(has_units, recipe, work, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    monkeypatch.setattr(machine, "computes_in_bfloat16", lambda device: has_units)
    monkeypatch.setattr(machine, "available_cores", lambda: 2)
    data = ["--train_data", str(work / "data" / "colours.json"), "--output_dir", str(tmp_path)]
    if recipe == "silent":
        recipe = str(tmp_path / "own.yaml")
        Path(recipe).write_text("stage: finetune\n")
    config = ["--config", recipe] if recipe else []
    run = parse_run([*config, "--init_from", str(work / "trained"), *data])
    source = read_source(run.model)
    collator = build_collator(run, build_processor(source))
    trainer = build_trainer(run, source, collator, load_sources(run, run.data.datasets))
    training = run.training
    training.max_steps = 1
    trainer.train()
    assert (run.model.dtype, training.bf16, training.dataloader_num_workers) == ("float32", has_units, 0)
    assert not trainer.model.is_gradient_checkpointing


def test_words_that_the_tokenizer_does_not_know_are_reported(work, tmp_path):
    samples = json.loads((work / "data" / "colours.json").read_text())
    for sample, answer in zip(samples, ["teal", "dark teal", "red"], strict=False):
        sample["conversations"][1]["value"] = answer
    (tmp_path / "odd.json").write_text(json.dumps(samples))
    run = parse_run([
        "--init_from", str(work / "trained"), "--train_data", str(tmp_path / "odd.json"),
        "--image_folder", str(work / "data"), "--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false",
    ])  # fmt: skip
    collator = build_collator(run, build_processor(read_source(run.model)))
    report = check_data(load_sources(run, run.data.datasets), collator)
    assert report.unknown == {"teal": 2, "dark": 1}
    assert "3 words of answers are unknown to the tokenizer" in report.summary()
    assert "teal (2), dark (1)" in report.summary()


def test_the_miniature_is_named_anywhere():
    assert ModelArguments(init_from="mini").init_from == str(mini_path())
