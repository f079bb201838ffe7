"""Each diffusion family in a whole model: composed, prompted, evaluated, inspected, trained, loaded elsewhere."""

import copy
import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_families
import torch
from loopback_hub import LoopbackHub, Repository
from PIL import Image
from train_fixtures import command, weights
from typer.testing import CliRunner
from without_package import REFUSE_PACKAGE

from sdllava import SDLlavaDiffusionModel, SDLlavaForConditionalGeneration, SDLlavaProcessor
from sdllava.analysis.attention import model_attention
from sdllava.backbones import read_published
from sdllava.commands.main import app
from sdllava.train.cache import FeatureCache
from sdllava.train.cache_writer import cache_record, write_cache
from sdllava.train.collator import SDLlavaCollator

KINDS = ("pixart", "sd3", "flux", "if")
TAPS = {"pixart": "T-B1-Cross-Q", "sd3": "T-B1-Joint-Q", "flux": "T-B2-Joint-Q", "if": "U-L1-R0-B0-Cross-Q"}
SIZES = {"image_size": 64, "grid_size": 4}
QUESTION = "red cube"


@pytest.fixture(scope="module")
def folders(build_once) -> dict[str, Path]:
    """A tiny model of each family in the published layout."""
    names = {"if": "deepfloyd_if"}
    return {kind: build_once(names.get(kind, kind), getattr(tiny_families, f"save_{kind}")) for kind in KINDS}


@dataclass
class Composed:
    """A model with a tower of one family, composed by the command."""

    kind: str
    path: Path
    model: SDLlavaForConditionalGeneration
    processor: SDLlavaProcessor
    image: Image.Image

    def inputs(self, question: str) -> dict[str, Any]:
        return self.processor(images=self.image, text="<image>\nx", question=question, return_tensors="pt")


@pytest.fixture(scope="module")
def compose(folders, published, build_once):
    """Composes the model of a family once, and gives its folder."""

    def write(kind: str, folder: Path) -> None:
        parts = {"diffusion": folders[kind], "vision": published["clip"], "language-model": published["llm"]}
        options = [text for name, part in parts.items() for text in (f"--{name}", str(part))]
        options += ["--tap", TAPS[kind], "--field", "grid_size=4", "--field", "fusion_num_attention_heads=4"]
        options += [] if kind == "if" else ["--field", "image_size=64"]  # IF's own size
        result = CliRunner().invoke(app, ["compose", str(folder / "model"), *options])
        assert result.exit_code == 0, result.output

    return lambda kind: build_once(f"composed-{kind}", lambda folder: write(kind, folder)) / "model"


@pytest.fixture(
    scope="module",
    params=[pytest.param(kind, marks=pytest.mark.slow if kind in ("pixart", "flux") else []) for kind in KINDS],
)
def composed_family(request, compose) -> Composed:
    path = compose(request.param)
    model = SDLlavaForConditionalGeneration.from_pretrained(path).eval()
    torch.manual_seed(0)
    torch.nn.init.normal_(model.model.fusion.out_proj.weight)  # so that the diffusion features reach the answer
    processor = SDLlavaProcessor.from_pretrained(path)
    return Composed(request.param, path, model, processor, tiny_families.noise_image())


@torch.no_grad()
def test_the_question_reaches_the_answer(composed_family):
    kind, model = composed_family.kind, composed_family.model
    logits = []
    for question in ("Is it RED?", "is it red?", "blue"):
        inputs = composed_family.inputs(question)
        logits.append(model(**inputs).logits[0, -1])
    tokenizers = {"sd3": 3, "flux": 2}.get(kind, 1)
    assert len([name for name in inputs if name.startswith("diffusion_input_ids")]) == tokenizers
    assert inputs["diffusion_pixel_values"].shape == (1, 3, 64, 64)
    # PixArt and DeepFloyd IF read prompts in lower case; so does CLIP's tokenizer, but not T5's
    assert torch.equal(logits[0], logits[1]) == (kind in ("pixart", "if"))
    assert not torch.allclose(logits[0], logits[2])
    assert model.generate(**inputs, max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]


def test_a_prompt_is_encoded_once_per_question(composed_family):
    """The empty prompt once for the weights; then each question once, however many tokens the answer has."""
    model = composed_family.model
    tower, calls = model.model.diffusion_tower, []
    tower._null_prompt = None
    encoders = [part for name, part in tower.backbone.named_children() if name.startswith("text_encoder")]
    handles = [part.register_forward_hook(lambda m, a, o, n=n: calls.append(n)) for n, part in enumerate(encoders)]
    encoding = None
    for question in (QUESTION, "blue"):
        inputs = composed_family.inputs(question)
        pixels = [inputs.pop(name) for name in ("pixel_values", "diffusion_pixel_values")]
        encoding = encoding or model.encode_images(*pixels)
        model.generate(**inputs, image_encodings=encoding, max_new_tokens=3, min_new_tokens=3)
    for handle in handles:
        handle.remove()
    assert sorted(calls) == sorted(list(range(len(encoders))) * 3)  # the empty prompt and two questions


def test_each_word_has_a_map(composed_family):
    kind = composed_family.kind
    found = model_attention(composed_family.model, composed_family.processor, composed_family.image, QUESTION)
    words = [word.text for word in found.words if not word.special]
    assert words == QUESTION.split() * (2 if kind == "sd3" else 1)  # CLIP's words, then T5's
    tokens = [token for word in found.words for token in word.tokens]
    assert tokens == list(range({"pixart": 120, "sd3": 333, "flux": 512, "if": 77}[kind]))
    total = found.maps.sum(axis=0)
    if kind == "pixart":
        np.testing.assert_allclose(total, 1, atol=1e-5)
    else:
        assert 0 < total.max() < 1  # the rest is attention of the image to itself


def test_the_page_has_maps_effects_and_answers(composed_family):
    """What its events call: they do not know the family."""
    from sdllava.demo.engine import Engine
    from sdllava.serving.limits import PAGE_LIMITS

    limits = replace(PAGE_LIMITS, max_new_tokens=3)
    engine = Engine(composed_family.model, composed_family.processor, "tiny", limits)
    encoded = engine.encode([composed_family.image])
    (attention,) = engine.attention(encoded, QUESTION)
    expected = model_attention(composed_family.model, composed_family.processor, composed_family.image, QUESTION)
    np.testing.assert_allclose(attention.question().grid, expected.question().grid, atol=1e-5)
    tap = composed_family.model.model.diffusion_tower.taps[0]
    assert engine.delta(encoded, QUESTION).heat.shape == (1, tap.height, tap.width)
    assert list(engine.answer(encoded, QUESTION))


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind == "sd3" else pytest.mark.slow) for kind in KINDS]
)
def test_ask_draws_a_heat_map(compose, tmp_path, kind):
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    tiny_families.noise_image().save(tmp_path / "p.png")
    arguments = ["ask", str(tmp_path / "p.png"), QUESTION, "--model", str(compose(kind)), "--device", "cpu"]
    arguments += ["--max-new-tokens", "2", "--heatmap", str(tmp_path / "heat.png")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "heat.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("maps", ["attention", "concepts"])
def test_inspect_attention(composed_family, tmp_path, maps):
    kind, numbers = composed_family.kind, tmp_path / "maps.json"
    if maps == "concepts" and kind == "if":
        pytest.skip("as for PixArt: the text has no outputs")
    tiny_families.noise_image().save(tmp_path / "p.png")
    arguments = ["inspect", "attention", str(tmp_path / "p.png"), QUESTION, "--model", str(composed_family.path)]
    result = CliRunner().invoke(app, [*arguments, "--maps", maps, "--output", str(numbers), "--device", "cpu"])
    if maps == "concepts" and kind == "pixart":
        assert result.exit_code == 1
        assert "there are no concept maps. Use attention maps" in " ".join(result.output.split())
        return
    assert result.exit_code == 0, result.output
    found = json.loads(numbers.read_text())
    words = [index for index, word in enumerate(found["words"]) if not word["special"]]
    (values,) = (np.array(value) for name, value in found.items() if name.startswith("t = "))
    assert found["unit"] == {"attention": "share of attention", "concepts": "share among the words"}[maps]
    if maps == "concepts":
        np.testing.assert_allclose(values[words].sum(axis=0), 1, atol=1e-5)
        assert values.sum() == pytest.approx(values[words].sum())
        assert np.ptp(values[words[0]]) > 0


def test_a_benchmark_runs(composed_family, mmvp_folder, few_tokens, few_resamples, tmp_path):
    from sdllava.evaluation.evaluate import EvaluationOptions, LoadedModel, evaluate

    loaded = LoadedModel("tiny", None, composed_family.model, composed_family.processor)
    results = evaluate(loaded, "mmvp", tmp_path, EvaluationOptions(data=str(mmvp_folder), limit=2))
    assert results["samples"] == 2


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_several_taps_timesteps_and_scales_are_concatenated(folders, kind):
    """With one pass per timestep, which reads all taps, and one call of each text encoder per prompt."""
    names = {"pixart": ["T-B0-Norm", "T-B1-Out"], "if": ["U-L0-R0-Vit-Out", "U-L0-R2-Res-Out"]}
    taps = names.get(kind, ["T-B0-Norm", "T-B1-Out"])
    fields = {**SIZES, "taps": taps, "timesteps": [50, 200], "guidance_scales": [0.0, 4.0]}
    tower = SDLlavaDiffusionModel.from_component_pretrained(str(folders[kind]), truncate=True, **fields)
    channels = tower.taps[0].channels
    tokenizers = read_published(str(folders[kind]), **fields).tokenizers
    ids = [t(["red", "blue"], padding="max_length", truncation=True, return_tensors="pt").input_ids for t in tokenizers]
    passes = []
    tower.backbone.denoiser.register_forward_pre_hook(lambda m, args: passes.append(1))
    output = tower(torch.rand(2, 3, 64, 64) * 2 - 1, *ids)
    assert len(passes) == 2
    assert output.last_hidden_state.shape == (2, 16, 2 * 2 * 2 * channels)
    null, given = output.unconditional_features, output.conditional_features
    by_scale = output.last_hidden_state.unflatten(-1, (4, 2, channels))  # tap and timestep, scale, channels
    torch.testing.assert_close(by_scale[..., 0, :].flatten(2), null)
    torch.testing.assert_close(by_scale[..., 1, :].flatten(2), null + 4 * (given - null), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"taps": ["nowhere"]}, r"no tap 'nowhere' in this denoiser\. The nearest are"),
        ({"timesteps": [1000]}, r"Timestep 1000 is outside the training schedule\. Use a value in 0\.\.999"),
    ],
)
def test_taps_and_timesteps_that_do_not_exist_raise(folders, kind, fields, message):
    others = {"pixart": "T-B1-Joint-Q", "sd3": "T-B1-Cross-Q", "flux": "U-L1-R1-B0-Cross-Q", "if": "T-B1-Norm"}
    if "taps" in fields:
        fields, message = {"taps": [others[kind]]}, message.replace("nowhere", others[kind])
    with pytest.raises(ValueError, match=message):
        read_published(str(folders[kind]), **{**SIZES, "taps": [TAPS[kind]], **fields})


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_text_encoder_raises(folders, tmp_path, kind):
    for part in folders[kind].iterdir():
        if part.name != "text_encoder":
            (tmp_path / part.name).symlink_to(part)
    with pytest.raises(
        OSError, match=r"from .*\(text_encoder/config.json is missing\)\. Give a repository .* has every part"
    ):
        read_published(str(tmp_path), **SIZES, taps=[TAPS[kind]])


def test_a_gated_repository_without_access_names_its_licence(monkeypatch, tmp_path):
    from huggingface_hub import constants

    source = "tester/flux@main"
    compose = ["compose", str(tmp_path / "new"), "--diffusion", source, "--vision", source, "--language-model", source]
    match = ["match", "--model", source, "--image", str(tmp_path / "p.png"), "--text", "x"]
    with LoopbackHub().running() as hub:
        hub.repositories["tester/flux"] = Repository(gated=True)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in {"HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_OFFLINE": False}.items():
            monkeypatch.setattr(constants, name, value)
        for arguments in (["taps", source], compose, match):
            result = CliRunner().invoke(app, arguments)
            message = " ".join(result.output.split())
            assert f"from '{source}' (the repository is gated, and this account has no access)." in message
            assert "Accept its licence at https://huggingface.co/tester/flux, then run `hf auth login`." in message


@pytest.mark.parametrize(
    ("config", "blocks"),
    [
        (tiny.diffusion_config("sd2"), {"BasicTransformerBlock", "ResnetBlock2D", "CLIPEncoderLayer"}),
        (tiny_families.diffusion_config("pixart"), {"BasicTransformerBlock", "T5Block"}),
        (tiny_families.diffusion_config("sd3"), {"JointTransformerBlock", "CLIPEncoderLayer", "T5Block"}),
        (tiny_families.diffusion_config("flux"), {"FluxTransformerBlock", "FluxSingleTransformerBlock", "T5Block"}),
    ],
    ids=["sd2", "pixart", "sd3", "flux"],
)
def test_blocks_of_the_parts_stay_on_one_device(config, blocks):
    with torch.device("meta"):
        assert SDLlavaDiffusionModel(config)._no_split_modules >= blocks


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["if", "sd3"])
def test_frozen_parts_that_were_left_out_come_back(compose, folders, tmp_path, kind):
    model = SDLlavaForConditionalGeneration.from_pretrained(compose(kind))
    model.config.components = {"diffusion": {"id": str(folders[kind])}}
    model.save_pretrained(tmp_path, bundle_frozen=False)
    expected, found = model.state_dict(), SDLlavaForConditionalGeneration.from_pretrained(tmp_path).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


@pytest.mark.parametrize("kind", ["if", "sd3"])
def test_a_cache_gives_the_features_and_records_every_text_encoder(compose, tmp_path, kind):
    path = compose(kind)
    model = SDLlavaForConditionalGeneration.from_pretrained(path).eval()
    processor = SDLlavaProcessor.from_pretrained(path)
    image = tiny_families.noise_image()
    image.save(tmp_path / "a.png")
    turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": "Yes."}]
    rows = [{"image": "a.png", "folder": str(tmp_path), "conversations": turns}]
    write_cache(model, SDLlavaCollator(processor), rows, tmp_path / "cache", "conditional", "float32")
    cache = FeatureCache(tmp_path / "cache")
    encoders = {"if": {"text_encoder"}, "sd3": {"vae", "text_encoder", "text_encoder_2", "text_encoder_3"}}[kind]
    assert cache.record["weights"].keys() == {"unet", "vision_tower"} | encoders
    (key,) = cache.shards
    inputs = processor(images=image, text="<image>\nx", question=QUESTION, return_tensors="pt")
    tower = model.model.diffusion_tower
    ids = {name.removeprefix("diffusion_"): value for name, value in inputs.items() if "diffusion_input_ids" in name}
    with torch.no_grad():
        expected = tower(pixel_values=inputs["diffusion_pixel_values"], **ids).conditional_features
    torch.testing.assert_close(cache.read(key)["conditional_features"], expected[0], rtol=0, atol=1e-5)


def test_a_cache_notices_a_changed_second_text_encoder_unless_an_earlier_version_wrote_it(compose):
    model = SDLlavaForConditionalGeneration.from_pretrained(compose("sd3"))
    processor = SDLlavaProcessor.from_pretrained(compose("sd3"))
    written = cache_record(model, processor, "conditional", "float32")
    earlier = copy.deepcopy(written)
    for name in ("text_encoder_2", "text_encoder_3"):
        del earlier["weights"][name]
    assert cache_record(model, processor, "conditional", "float32", written) == written
    with torch.no_grad():
        next(model.model.diffusion_tower.backbone.text_encoder_2.parameters()).add_(1)
    found = cache_record(model, processor, "conditional", "float32", written)
    changed = {name for name, value in found["weights"].items() if value != written["weights"][name]}
    assert changed == {"text_encoder_2"}
    assert cache_record(model, processor, "conditional", "float32", earlier) == earlier


@pytest.mark.parametrize("kind", KINDS)
def test_both_stages_train(folders, work, kind):
    from sdllava.train.run import train

    parts = {"diffusion": folders[kind], "taps": TAPS[kind], "max_steps": 2, "save_strategy": "no"}
    train(command(work, f"align-{kind}", stage="align", **parts))
    later = {"init_from": work / f"align-{kind}", "max_steps": 2, "save_strategy": "no"}
    train(command(work, f"finetune-{kind}", stage="finetune", **later))
    before, after = weights(work / f"align-{kind}"), weights(work / f"finetune-{kind}")
    changed = {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])} - {"weight"}
    assert changed == {"fusion", "multi_modal_projector", "language_model"}


WITHOUT_PACKAGE = (
    REFUSE_PACKAGE
    + """
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
image, *folders = sys.argv[1:]
content = [{"type": "image", "path": image}, {"type": "text", "text": "What?"}]
messages = [{"role": "user", "content": content}]
options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
for folder in folders:
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        print(model(**processor.apply_chat_template(messages, **options)).logits[0, -1, :5].tolist())
"""
)


@pytest.mark.slow
def test_checkpoints_load_where_the_package_is_not_installed(compose, tmp_path):
    image = tmp_path / "p.png"
    tiny_families.noise_image().save(image)
    paths = [compose(kind) for kind in KINDS]
    arguments = [sys.executable, "-c", WITHOUT_PACKAGE, str(image), *map(str, paths)]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    content = [{"type": "image", "path": str(image)}, {"type": "text", "text": "What?"}]
    for path, logits in zip(paths, found, strict=True):
        model = SDLlavaForConditionalGeneration.from_pretrained(path).eval()
        inputs = SDLlavaProcessor.from_pretrained(path).apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt",
        )  # fmt: skip
        with torch.no_grad():
            expected = model(**inputs).logits[0, -1, :5]
        torch.testing.assert_close(torch.tensor(logits), expected, rtol=0, atol=1e-5)
