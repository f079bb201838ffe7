"""The command line: ten samples learnt by heart, checked data, sample answers, the plain Trainer, plain mistakes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from train_fixtures import COLOURS, command, write_colours, write_parts
from transformers import Trainer, TrainingArguments
from typer import Typer
from typer.testing import CliRunner

from sdllava.commands import train as cli
from sdllava.data.sources import DataSource, load_data
from sdllava.modeling_sdllava import SDLlavaForConditionalGeneration
from sdllava.processors import SDLlavaProcessor
from sdllava.train.collator import SDLlavaCollator
from sdllava.train.run import cache, train
from sdllava.train.trainer import EpochCallback


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("work")
    write_parts(root)
    write_colours(root / "data")
    return root


@pytest.fixture(scope="module")
def app() -> Typer:
    app = Typer()
    app.command("train", context_settings=cli.TRAIN_CONTEXT)(cli.train)
    app.command("merge")(cli.merge)
    app.command("cache", context_settings=cli.TRAIN_CONTEXT)(cli.cache)
    return app


def test_ten_samples_are_learnt_by_heart(work):
    flags = {"max_steps": 120, "per_device_train_batch_size": 10, "learning_rate": 1e-2, "save_strategy": "no"}
    flags |= {"feature_cache": work / "cache", "fixed_noise": "true", "question_choice": "last", "logging_steps": 20}
    arguments = command(work, "heart", **flags)
    cache(
        command(work, "heart", fixed_noise="true", question_choice="last"),
        str(work / "cache"),
        "conditional",
        "float32",
        10,
    )
    subprocess.run([sys.executable, "-m", "sdllava.train", *arguments], check=True, capture_output=True)
    model = SDLlavaForConditionalGeneration.from_pretrained(work / "heart").eval()
    processor = SDLlavaProcessor.from_pretrained(work / "heart")
    for i, colour in enumerate(COLOURS):
        question = [{"type": "image", "path": str(work / "data" / "images" / f"{i}.png")}]
        question.append({"type": "text", "text": "what is the colour of the thing ?"})
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        )  # fmt: skip
        ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert processor.tokenizer.decode(ids).strip() == f"{colour} </s>"


def test_check_data_through_the_command(work, app):
    result = CliRunner().invoke(app, ["train", *command(work, "checked", check_data="true", n_sample_answers=1)])
    assert result.exit_code == 0, result.exception
    assert "10 samples, 10 images, 0 samples without an image, 10 answers" in result.stdout
    assert "ASSISTANT:[[red </s>]]" in result.stdout
    assert not (work / "checked" / "model.safetensors").exists()
    rows = [*json.loads((work / "data" / "colours.json").read_text()), {"id": "bad"}]
    (work / "data" / "bad.json").write_text(json.dumps(rows))
    bad = command(work, "checked", check_data="true", train_data=work / "data" / "bad.json")
    with pytest.raises(ValueError, match="1 of 11 samples cannot be used"):
        train(bad)
    with pytest.raises(ValueError, match=r"bad\.json:1 sample 10 has no `conversations`"):
        train(command(work, "bad", train_data=work / "data" / "bad.json"))
    train(
        command(work, "skipped", train_data=work / "data" / "bad.json", bad_samples="skip", max_steps=1, save_steps=1)
    )


@pytest.mark.parametrize("lora", [False, True])
def test_evaluation_shows_sample_answers(work, capsys, lora):
    recipe = work / "eval.yaml"
    recipe.write_text(f"eval_datasets:\n  - path: {work}/data/colours.json\nn_sample_answers: 2\n")
    flags = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 1, "save_strategy": "no"}
    if lora:
        train(command(work, "base", max_steps=1, save_strategy="no"))
        flags |= {"init_from": work / "base", "lora_r": 2}
    train(["--config", str(recipe), *command(work, f"evaluated-{lora}", **flags)])
    shown = capsys.readouterr().out
    assert "what is the colour of the thing ?\n  expected: red\n  answered: " in shown
    assert "expected: green" in shown
    assert "expected: blue" not in shown
    assert "'eval_loss'" in shown


def test_the_command_continues_from_a_checkpoint_of_ours(work):
    """In a process of its own, where nothing has registered the model with transformers yet."""
    train(command(work, "begun", max_steps=1, save_strategy="no"))
    arguments = command(work, "continued", init_from=work / "begun", max_steps=1, save_strategy="no")
    subprocess.run([sys.executable, "-m", "sdllava", "train", *arguments], check=True, capture_output=True)
    assert (work / "continued" / "model.safetensors").is_file()


def test_what_the_run_prints_first(work, capsys):
    train(command(work, "printed", stage="align", max_steps=1, save_strategy="no"))
    shown = capsys.readouterr().out
    assert "language model" in shown
    assert "projector" in shown
    assert "Memory expected on each process" in shown


def test_the_plain_trainer_takes_model_and_collator(work):
    train(command(work, "first", max_steps=1, save_strategy="no"))
    model = SDLlavaForConditionalGeneration.from_pretrained(work / "first")
    model.set_stage("align")
    collator = SDLlavaCollator(SDLlavaProcessor.from_pretrained(work / "first"))
    before = {name: p.clone() for name, p in model.named_parameters()}
    arguments = TrainingArguments(
        work / "plain", max_steps=2, per_device_train_batch_size=4, remove_unused_columns=False, use_cpu=True,
        save_strategy="no", report_to=[], learning_rate=1e-2, disable_tqdm=True,
    )  # fmt: skip
    data = load_data([DataSource(str(work / "data" / "colours.json"))])
    trainer = Trainer(model, arguments, collator, train_dataset=data, callbacks=[EpochCallback(collator)])
    trainer.train()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all(name.startswith(("model.fusion", "model.multi_modal_projector")) for name in changed)


def test_a_llava_is_continued(published, work):
    flags = {"init_from": published["llava"], "diffusion": published["sd2"], "image_size": 64, "grid_size": 4}
    flags |= {"fusion_num_attention_heads": 4, "max_length": 1024, "max_steps": 1, "save_strategy": "no"}
    train(command(work, "upgraded", taps="U-L1-R1-B0-Cross-Q", **flags))
    assert SDLlavaForConditionalGeneration.from_pretrained(work / "upgraded").config.fusion == "cross_attention"


def test_merge_and_cache_through_the_command(work, app):
    arguments = ["cache", "--output", str(work / "latents"), "--kind", "latents", "--batch-size", "4"]
    result = CliRunner().invoke(app, [*arguments, *command(work, "unused")])
    assert result.exit_code == 0, result.exception
    assert f"10 keys written to {work / 'latents'}" in result.stdout
    result = CliRunner().invoke(app, ["merge", str(work / "first"), str(work / "m")])
    assert "holds no adapter" in str(result.exception)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"language_model": None}, "there is no model to train"),
        ({"train_data": None}, "no data is given"),
        ({"stage": "fine"}, "stage"),
        ({"pseudo_captions": "none.json"}, "none.json"),
    ],
)
def test_plain_mistakes_say_so(work, flags, reason, capsys):
    with pytest.raises((ValueError, FileNotFoundError, SystemExit)) as error:
        train(command(work, "mistake", **flags))
    assert reason in str(error.value) + capsys.readouterr().err


def test_the_commands_load_without_heavy_imports():
    script = "import sys; sys.argv = ['sdllava']; import sdllava.commands.train; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not {"torch", "trl", "transformers", "datasets"} & set(result.stdout.split())
