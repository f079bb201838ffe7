"""Checkpoints: versions, safetensors only, remote code that never runs with the package installed, parts left out."""

import copy
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    pipeline,
)

import sdllava
from sdllava import SDLlavaConfig, SDLlavaDiffusionModel, SDLlavaForConditionalGeneration, SDLlavaProcessor
from sdllava.checkpoint_files import CheckpointError
from sdllava.towers import load_tower
from sdllava.train.adapters import load_merged
from sdllava.version import CONFIGURATION_VERSION, __version__

EARLIER = Path(__file__).parent / "data" / "earlier-version"
"""Saved before configurations recorded a version, with its answer at that time."""

sdllava.register()


@pytest.fixture
def checkpoint(composed, tmp_path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(composed, tmp_path / "checkpoint"))


@pytest.fixture(scope="module")
def loaded(composed) -> SDLlavaForConditionalGeneration:
    """The composed model, which tests only read or copy."""
    return SDLlavaForConditionalGeneration.from_pretrained(composed)


def read(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def change(folder: Path, **fields) -> None:
    (folder / "config.json").write_text(json.dumps({**read(folder), **fields}))


def tensors(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    different = [n for n in first if first[n].dtype != second[n].dtype or not torch.equal(first[n], second[n])]
    assert different == []


def test_a_checkpoint_records_the_versions_of_package_and_configuration(composed, loaded, tmp_path):
    versions = {"sdllava_version": __version__, "configuration_version": CONFIGURATION_VERSION}
    assert versions.items() <= read(composed).items()
    loaded.model.diffusion_tower.save_pretrained(tmp_path)
    assert versions.items() <= read(tmp_path).items()
    assert sdllava.__version__ == __version__
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert f'version = "{__version__}"' in project or "sdllava.version.__version__" in project


def test_an_earlier_version_answers_as_it_did():
    expected = json.loads((EARLIER / "expected.json").read_text())
    assert "configuration_version" not in read(EARLIER)
    model = SDLlavaForConditionalGeneration.from_pretrained(EARLIER, dtype=torch.float32)
    pixels = bytes(i % 255 for i in range(12 * 10 * 3))
    content = [
        {"type": "image", "image": Image.frombytes("RGB", (10, 12), pixels)},
        {"type": "text", "text": expected["question"]},
    ]
    inputs = SDLlavaProcessor.from_pretrained(EARLIER).apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1]
    torch.testing.assert_close(logits, torch.tensor(expected["logits"]), atol=1e-4, rtol=1e-4)
    generated = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert generated[0, inputs["input_ids"].shape[1] :].tolist() == expected["tokens"]


@pytest.mark.parametrize(
    "load", [AutoConfig, SDLlavaConfig, AutoModelForImageTextToText, SDLlavaForConditionalGeneration]
)
def test_a_newer_version_raises_with_both_versions_and_the_fix(checkpoint, load):
    change(checkpoint, configuration_version=CONFIGURATION_VERSION + 1, sdllava_version="9.8.7")
    with pytest.raises(ValueError, match=rf"version {CONFIGURATION_VERSION + 1}.*9\.8\.7.*--upgrade sdllava"):
        load.from_pretrained(checkpoint)


def spoil(checkpoint: Path, tmp_path: Path) -> Path:
    """Replace the code of a checkpoint by code that leaves a trace when it runs."""
    trace = tmp_path / "executed"
    files = list(checkpoint.glob("*.py"))
    assert len(files) > 5
    for path in files:
        path.write_text(f"open({str(trace)!r}, 'a').write({path.name!r})\nraise SystemExit('executed')\n")
    return trace


@pytest.mark.parametrize("trust", [True, pytest.param(None, marks=pytest.mark.slow)])
def test_the_code_of_a_checkpoint_never_runs_with_the_package_installed(checkpoint, tmp_path, trust):
    trace = spoil(checkpoint, tmp_path)
    others = () if trust else (AutoModel, AutoModelForMultimodalLM)
    for auto in (AutoConfig, AutoModelForImageTextToText, AutoProcessor, *others):
        loaded = auto.from_pretrained(checkpoint, trust_remote_code=trust)
        assert type(loaded).__module__.startswith("sdllava.")
    for task in ("vqa",) if trust else ("visual-question-answering", "vqa"):
        vqa = pipeline(task, model=str(checkpoint), trust_remote_code=trust)
        assert type(vqa).__module__ == "sdllava.pipeline"
    assert vqa(Image.new("RGB", (20, 30)), "What?", max_new_tokens=2)
    assert not trace.exists()


def test_a_pickled_model_raises_unread(checkpoint, tmp_path):
    state = torch.nn.Linear(2, 2).state_dict()
    (checkpoint / "model.safetensors").unlink()
    torch.save(state, checkpoint / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin, a pickle, which can run any code.*convert"):
        AutoModelForImageTextToText.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match="use_safetensors=False"):
        SDLlavaForConditionalGeneration.from_pretrained(checkpoint, use_safetensors=False)


def test_a_pickle_in_a_folder_with_safetensors_is_not_read(checkpoint):
    (checkpoint / "pytorch_model.bin").write_bytes(b"no pickle at all")
    SDLlavaForConditionalGeneration.from_pretrained(checkpoint)


def test_a_pickled_adapter_raises(checkpoint, tmp_path):
    config = {"peft_type": "LORA", "base_model_name_or_path": str(checkpoint), "target_modules": ["q_proj"]}
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    torch.save({}, adapter / "adapter_model.bin")
    for load in (SDLlavaForConditionalGeneration.from_pretrained, load_merged):
        with pytest.raises(ValueError, match=r"adapter_model\.bin, a pickle"):
            load(str(adapter))


def test_a_pickled_diffusion_model_raises(published, tmp_path):
    folder = shutil.copytree(published["sd2"], tmp_path / "sd2")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ValueError, match=r"unet/diffusion_pytorch_model\.bin, a pickle"):
        SDLlavaDiffusionModel.from_component_pretrained(
            str(folder), taps=["U-L1-R1-B0-Cross-Q"], image_size=64, grid_size=4
        )


def test_a_loaded_diffusion_model_is_frozen(loaded):
    assert not any(p.requires_grad for p in loaded.model.diffusion_tower.backbone.parameters())


def test_sharded_and_unsharded_checkpoints_hold_the_same_tensors(loaded, tmp_path):
    loaded.save_pretrained(tmp_path, max_shard_size="1MB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert_same(tensors(loaded), tensors(SDLlavaForConditionalGeneration.from_pretrained(tmp_path)))


@pytest.fixture
def with_sources(loaded, published):
    """A model that records where its frozen parts came from (folders stand for repositories)."""
    model = copy.deepcopy(loaded)
    model.config.components = {"diffusion": {"id": str(published["sd2"])}, "vision": {"id": str(published["clip"])}}
    return model


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_frozen_parts_that_were_left_out_come_back_bitwise(with_sources, composed, tmp_path, dtype):
    with_sources.save_pretrained(tmp_path / "whole")
    with_sources.save_pretrained(tmp_path / "small", bundle_frozen=False)
    sizes = {name: (tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "small")}
    assert sizes["small"] < sizes["whole"] / 10
    whole, small = (SDLlavaForConditionalGeneration.from_pretrained(tmp_path / n, dtype=dtype) for n in sizes)
    assert_same(tensors(whole), tensors(small))
    assert not any(p.requires_grad for p in small.model.diffusion_tower.backbone.parameters())
    SDLlavaProcessor.from_pretrained(composed).save_pretrained(tmp_path / "small")
    tower, _ = load_tower(str(tmp_path / "small"), dtype)
    assert_same(tensors(whole.model.diffusion_tower), tensors(tower))
    small.save_pretrained(tmp_path / "again")  # bundled again by default
    assert read(tmp_path / "again").get("left_out") is None
    assert_same(
        tensors(whole), tensors(SDLlavaForConditionalGeneration.from_pretrained(tmp_path / "again", dtype=dtype))
    )


@pytest.mark.slow
def test_frozen_parts_with_another_hash_raise(with_sources, published, tmp_path):
    with_sources.save_pretrained(tmp_path / "small", bundle_frozen=False)
    other = tiny.save_diffusion(tmp_path / "other")
    components = {**with_sources.config.components, "diffusion": {"id": str(other)}}
    change(tmp_path / "small", components=components)
    with pytest.raises(ValueError, match="holds other diffusion weights"):
        SDLlavaForConditionalGeneration.from_pretrained(tmp_path / "small")


@pytest.mark.slow
def test_trained_or_unrecorded_parts_cannot_be_left_out(with_sources, loaded, tmp_path):
    with torch.no_grad():
        next(with_sources.model.diffusion_tower.unet.parameters()).add_(1)
    with pytest.raises(ValueError, match="diffusion weights differ from those of"):
        with_sources.save_pretrained(tmp_path, bundle_frozen=False)
    assert with_sources.config.left_out is None
    with pytest.raises(ValueError, match="records none for the diffusion model"):
        loaded.save_pretrained(tmp_path, bundle_frozen=False)


def test_assembly_records_where_parts_come_from_but_no_path(published, tmp_path):
    folder = Path(shutil.copytree(published["sd2"], tmp_path / "sd2"))
    (folder / "README.md").write_text("---\nlicense: openrail++\n---\n")
    parts = {"diffusion": str(folder), "vision": str(published["clip"]), "language_model": str(published["llm"])}
    from sdllava.parts import read_parts

    config = read_parts(
        **parts, taps=["U-L1-R1-B0-Cross-Q"], image_size=64, grid_size=4, fusion_num_attention_heads=4
    ).config
    assert config.components == {"diffusion": {"license": "openrail++"}, "vision": {}, "language_model": {}}
    assert not any(str(path) in config.to_json_string() for path in (tmp_path, *published.values()))


@pytest.mark.parametrize(
    "load",
    [
        SDLlavaForConditionalGeneration.from_pretrained,
        partial(SDLlavaForConditionalGeneration.from_pretrained, dtype="bfloat16"),
        AutoModelForImageTextToText.from_pretrained,
        partial(AutoModelForImageTextToText.from_pretrained, dtype="bfloat16"),
        partial(SDLlavaForConditionalGeneration.from_pretrained, is_trained=False),
        lambda folder: pipeline("visual-question-answering", model=str(folder)),
    ],
    ids=["class", "dtype", "auto", "auto-dtype", "field", "pipeline"],
)
def test_a_weight_that_is_missing_is_never_made_up(checkpoint, load):
    file, name = checkpoint / "model.safetensors", "model.multi_modal_projector.linear_1.weight"
    weights = load_file(file)
    del weights[name]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises((CheckpointError, ValueError), match=f"it lacks 1 weights, '{name}' first"):
        load(checkpoint)
