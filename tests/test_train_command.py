"""The commands: ten samples learnt by heart, checked data, sample answers, the plain Trainer, plain mistakes."""

import json
import subprocess
import sys

import pytest
import torch
from train_fixtures import COLOURS, PART_SIZES, command, model_arguments
from transformers import Trainer, TrainingArguments
from typer import Typer
from typer.testing import CliRunner

from sdllava.chat_templates import VICUNA_V1_5
from sdllava.commands import train as cli
from sdllava.data.sources import DataSource, load_data
from sdllava.modeling_sdllava import SDLlavaForConditionalGeneration
from sdllava.processors import SDLlavaProcessor
from sdllava.train.__main__ import main
from sdllava.train.arguments import ModelArguments
from sdllava.train.build import build_model, build_processor, read_source
from sdllava.train.check import require_supervision
from sdllava.train.collator import SDLlavaCollator
from sdllava.train.run import cache, parse_run, train


@pytest.fixture(scope="module")
def app() -> Typer:
    app = Typer()
    app.command("train", context_settings=cli.TRAIN_CONTEXT)(cli.train)
    app.command("merge")(cli.merge)
    app.command("cache", context_settings=cli.TRAIN_CONTEXT)(cli.cache)
    return app


@pytest.mark.slow
def test_ten_samples_are_learnt_by_heart(work):
    data = {"fixed_noise": "true", "question_choice": "last"}
    flags = {"max_steps": 60, "per_device_train_batch_size": 10, "learning_rate": 2e-2, "save_strategy": "no"}
    cache(command(work, "heart", **data), str(work / "cache"), "conditional", "float32", 10)
    main(command(work, "heart", feature_cache=work / "cache", logging_steps=20, **flags, **data))
    model = SDLlavaForConditionalGeneration.from_pretrained(work / "heart").eval()
    processor = SDLlavaProcessor.from_pretrained(work / "heart")
    chats = []
    for i in range(len(COLOURS)):
        question = [{"type": "image", "path": str(work / "data" / "images" / f"{i}.png")}]
        question.append({"type": "text", "text": "what is the colour of the thing ?"})
        chats.append([{"role": "user", "content": question}])
    inputs = processor.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    answers = processor.tokenizer.batch_decode(ids)
    assert [answer.split()[:2] for answer in answers] == [[colour, "</s>"] for colour in COLOURS]


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


def test_evaluation_data_is_checked_before_training(work, capsys):
    rows = json.loads((work / "data" / "colours.json").read_text())
    (work / "data" / "unseen.json").write_text(json.dumps([*rows, {**rows[0], "image": "images/none.png"}]))
    flags = {"eval_datasets": f"[{{path: {work / 'data' / 'unseen.json'}}}]", "eval_strategy": "steps"}
    recipe = work / "evaluated.yaml"
    recipe.write_text("".join(f"{name}: {value}\n" for name, value in flags.items()))
    with pytest.raises(FileNotFoundError, match=r"1 of 11 sampled images of .*unseen\.json"):
        train(command(work, "evaluated", config=recipe))
    assert not (work / "evaluated").exists()
    with pytest.raises(ValueError, match="1 of 11 samples cannot be used"):
        train(command(work, "evaluated", config=recipe, check_data="true"))
    assert "10 samples, 10 images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "steps"),
    [({}, 4), ({"gradient_accumulation_steps": 3}, 3), ({"global_batch_size": 8}, 2)],
)
def test_flags_win_over_the_batch_size_of_a_packaged_recipe(work, flags, steps):
    run = parse_run(command(work, "batches", config="own-data/lora", init_from=work / "trained", **flags))
    assert run.training.gradient_accumulation_steps == steps


@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_prints_its_parts_and_sample_answers(work, capsys, lora):
    """And it skips an unreadable sample."""
    rows = [*json.loads((work / "data" / "colours.json").read_text()), {"id": "bad"}]
    (work / "data" / "skipped.json").write_text(json.dumps(rows))
    recipe = work / "eval.yaml"
    recipe.write_text(f"eval_datasets:\n  - path: {work}/data/colours.json\nn_sample_answers: 2\n")
    flags = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 1, "save_strategy": "no"}
    flags |= {"train_data": work / "data" / "skipped.json", "bad_samples": "skip"}
    flags |= {"lora_r": 2} if lora else {}
    flags["init_from"] = work / "trained"
    train(["--config", str(recipe), *command(work, f"evaluated-{lora}", **flags)])
    printed = capsys.readouterr().out
    assert "what is the colour of the thing ?\n  expected: red\n  answered: " in printed
    assert "expected: green" in printed
    assert "expected: blue" not in printed
    assert "'eval_loss'" in printed
    assert "language model" in printed
    assert "projector" in printed


def test_the_plain_trainer_takes_model_and_collator(work):
    model = SDLlavaForConditionalGeneration.from_pretrained(work / "trained")
    model.set_stage("align")
    collator = SDLlavaCollator(SDLlavaProcessor.from_pretrained(work / "trained"))
    before = {name: p.clone() for name, p in model.named_parameters()}
    arguments = TrainingArguments(
        work / "plain", max_steps=2, per_device_train_batch_size=4, remove_unused_columns=False, use_cpu=True,
        save_strategy="no", report_to=[], learning_rate=1e-2, disable_tqdm=True,
    )  # fmt: skip
    data = load_data([DataSource(str(work / "data" / "colours.json"))])
    trainer = Trainer(model, arguments, collator, train_dataset=data)
    trainer.train()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all(name.startswith(("model.fusion", "model.multi_modal_projector")) for name in changed)


def test_a_llava_is_a_starting_point(published, work):
    fields = {"image_size": 64, "grid_size": 4, "fusion_num_attention_heads": 4, "taps": ["U-L1-R1-B0-Cross-Q"]}
    arguments = ModelArguments(init_from=str(published["llava"]), diffusion=str(work / "sd2"), **fields)
    source = read_source(arguments)
    model, processor = build_model(source), build_processor(source)
    assert model.config.fusion == "cross_attention"
    assert processor.num_image_tokens == model.config.num_image_tokens
    assert processor.chat_template == VICUNA_V1_5
    assert all(p.requires_grad for p in model.model.language_model.parameters())


def test_a_composed_llava_can_be_trained(published, work):
    """Its own template has no end token."""
    parts = {"llava": str(published["llava"]), "diffusion": str(work / "sd2")}
    fields = {**PART_SIZES, "taps": ["U-L1-R1-B0-Cross-Q"]}
    composed = work / "composed"
    SDLlavaForConditionalGeneration.from_llava_pretrained(**parts, **fields).save_pretrained(composed)
    SDLlavaProcessor.from_llava_pretrained(**parts, **fields).save_pretrained(composed)
    assert "ASSISTANT" in SDLlavaProcessor.from_pretrained(composed).chat_template
    processor = build_processor(read_source(ModelArguments(init_from=str(composed))))
    require_supervision(load_data([DataSource(str(work / "data" / "colours.json"))]), SDLlavaCollator(processor))


@pytest.mark.slow
def test_a_llava_trains(published, work):
    flags = {"init_from": published["llava"], "diffusion": published["sd2"], "image_size": 64, "grid_size": 4}
    flags |= {"fusion_num_attention_heads": 4, "max_length": 1024, "max_steps": 1, "save_strategy": "no"}
    train(command(work, "upgraded", taps="U-L1-R1-B0-Cross-Q", **flags))
    assert SDLlavaForConditionalGeneration.from_pretrained(work / "upgraded").config.fusion == "cross_attention"


def test_a_run_sets_fields_of_the_configurations(work):
    """Those that this package's own recipes leave at their defaults, too."""
    fields = {"vae_in_fp32": False, "vision_feature_layer": [-3], "projector_hidden_act": "relu"}
    model = build_model(read_source(model_arguments(work, dtype="bfloat16", **fields)))
    assert model.model.diffusion_tower.vae.dtype == torch.bfloat16
    assert model.config.vision_feature_layer == [-3]
    assert model.config.projector_hidden_act == "relu"


def test_merge_and_cache_through_the_command(work, app):
    arguments = ["cache", "--output", str(work / "latents"), "--kind", "latents", "--batch-size", "4"]
    result = CliRunner().invoke(app, [*arguments, *command(work, "unused", init_from=work / "trained")])
    assert result.exit_code == 0, result.exception
    assert f"10 keys written to {work / 'latents'}" in result.stdout
    result = CliRunner().invoke(app, ["merge", str(work / "trained"), str(work / "m")])
    assert "holds no adapter" in str(result.exception)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"language_model": None}, "No model to train"),
        ({"train_data": None}, "There is no training data"),
        ({"stage": "fine"}, "stage"),
        ({"gradient_accumulation_steps": 2, "global_batch_size": 8}, "both set the samples of a step"),
        ({"pseudo_captions": "none.json"}, "none.json"),
        ({"config": "clap/align"}, "Recipe 'clap/align' does not exist"),
    ],
)
def test_plain_mistakes_raise(work, flags, reason, capsys):
    with pytest.raises((ValueError, FileNotFoundError, SystemExit)) as error:
        train(command(work, "mistake", **flags))
    assert reason in str(error.value) + capsys.readouterr().err


def test_commands_and_recipe_names_need_no_heavy_imports():
    script = (
        "import sys\nsys.argv = ['sdllava']\nimport sdllava.commands.train\nfrom sdllava.train.__main__ import main\n"
        "try:\n    main(['--config', 'clap/align'])\nexcept FileNotFoundError as error:\n    print(error)\n"
        "print(*sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "Recipe 'clap/align' does not exist" in result.stdout
    assert not {"torch", "trl", "transformers", "datasets"} & set(result.stdout.split())
