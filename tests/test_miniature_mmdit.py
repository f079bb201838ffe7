"""The miniature diffusion transformer at the smoke scale: its text, attention, training and published layout."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from research.miniature import mmdit
from research.miniature.loop import Run
from research.miniature.mmdit import KeyBias, build_transformer, text_encoders, transformer_config, zero_row_bias
from research.miniature.pretrain import build, pretrain
from research.miniature.scales import SCALES
from research.miniature.study import transformer as study
from research.miniature.study import transformer_page
from research.miniature.study.claims import sentence
from research.miniature.study.run import finished_part, run_study
from sdllava.analysis.loading import load_analysis_model
from sdllava.analysis.reading import read_features
from sdllava.evaluation import bootstrap
from sdllava.scenes.render import render
from sdllava.scenes.world import sample_scene
from sdllava.sd3 import T5_LENGTH


@pytest.fixture
def text_model() -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, eos_token_id=49
    )
    return CLIPTextModel(config).eval()


@pytest.fixture
def transformer() -> SD3Transformer2DModel:
    found = build_transformer(transformer_config(16, 2, 2, 16))
    for parameter in found.parameters():
        nn.init.normal_(parameter, std=0.3)
    return found.eval()


def test_the_first_text_encoder_is_the_trained_one_and_the_second_gives_zeros(text_model):
    first, second = text_encoders(text_model)
    ids = torch.tensor([[48, 3, 4, 49, 0, 0]])
    trained, read = text_model(ids, output_hidden_states=True), first(ids, output_hidden_states=True)
    torch.testing.assert_close(read.hidden_states[-2], trained.hidden_states[-1])
    torch.testing.assert_close(read.text_embeds, trained.pooler_output)
    assert not second(ids, output_hidden_states=True).hidden_states[-2].any()


def test_a_transformer_predicts_zero_at_first():
    found = build_transformer(transformer_config(16, 2, 2, 16))
    prompts = {"encoder_hidden_states": torch.randn(1, 3, 24), "pooled_projections": torch.randn(1, 24)}
    assert not found(torch.randn(1, 4, 32, 32), timestep=torch.ones(1), **prompts).sample.any()


@torch.no_grad()
def test_one_weighted_row_of_zeros_equals_the_256_in_place_of_t5(transformer):
    latents, pooled, text = torch.randn(2, 4, 32, 32), torch.randn(2, 24), torch.randn(2, 5, 24)
    inputs = {"pooled_projections": pooled, "timestep": torch.tensor([100.0, 700.0])}
    whole = nn.functional.pad(text, (0, 0, 0, T5_LENGTH))
    expected = transformer(latents, encoder_hidden_states=whole, **inputs).sample
    with KeyBias(zero_row_bias(64, 5)):
        found = transformer(latents, encoder_hidden_states=nn.functional.pad(text, (0, 0, 0, 1)), **inputs).sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    unweighted = transformer(latents, encoder_hidden_states=nn.functional.pad(text, (0, 0, 0, 1)), **inputs).sample
    assert (unweighted - expected).abs().max() > 1e-2


@pytest.fixture(scope="session")
def smoke_mmdit(smoke_miniature, build_once):
    """The smoke miniature with a diffusion transformer."""

    def fill(folder):
        shutil.copytree(smoke_miniature, folder, dirs_exist_ok=True)
        pretrain("smoke", folder, ("mmdit",))

    return build_once("smoke-mmdit", fill)


@pytest.mark.slow
def test_a_stopped_training_resumes_and_its_pipeline_is_published(smoke_mmdit, tmp_path):
    steps = [
        json.loads(line)["step"] for line in (smoke_mmdit / "state" / "mmdit-checks.jsonl").read_text().splitlines()
    ]
    assert steps == [2, 4]
    (tmp_path / "state").mkdir()
    for name in ("diffusion", "prompts", "state/latents.safetensors"):
        (tmp_path / name).symlink_to(smoke_mmdit / name)
    budget = SCALES["smoke"].budgets["mmdit"]
    Run(build("mmdit", SCALES["smoke"], tmp_path, 0), budget, tmp_path / "state").train(2)
    resumed = Run(build("mmdit", SCALES["smoke"], tmp_path, 0), budget, tmp_path / "state")
    assert resumed.step == 2
    resumed.train()
    ours, theirs = load_file(resumed.state_file), load_file(smoke_mmdit / "state" / "mmdit.safetensors")
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())

    pipeline = StableDiffusion3Pipeline.from_pretrained(smoke_mmdit / "mmdit", text_encoder_3=None, tokenizer_3=None)
    part = build("mmdit", SCALES["smoke"], smoke_mmdit, 0)
    tokens, _, pooled, _ = pipeline.encode_prompt("a red star", None, None, do_classifier_free_guidance=False)
    given = part.encode_prompts(["a red star"])
    torch.testing.assert_close(given["encoder_hidden_states"][:, :-1], tokens[:, :-T5_LENGTH])
    torch.testing.assert_close(given["pooled_projections"], pooled)


def test_the_page_is_what_the_generator_writes_from_its_numbers():
    folder = Path(mmdit.__file__).parent
    numbers = json.loads((folder / "mmdit.json").read_text(encoding="utf-8"))
    assert (folder / "mmdit.md").read_text(encoding="utf-8") == transformer_page.transformer_page(numbers)


@pytest.mark.slow
def test_the_study_of_the_transformer_reads_it_with_and_without_text(smoke_mmdit, tmp_path, monkeypatch):
    monkeypatch.setattr(bootstrap, "REPLICATES", 50)
    monkeypatch.setattr(study, "TIMESTEPS", (180, 420))
    monkeypatch.setattr(transformer_page, "TIMESTEPS", (180, 420))
    shutil.copytree(smoke_mmdit, tmp_path, dirs_exist_ok=True)
    (written,) = run_study(tmp_path, tmp_path / "docs", "smoke", ("h",))
    text, numbers = written.read_text(), finished_part(tmp_path, "h")
    assert "They are not results." in text
    assert all(sentence(found) in text for found in numbers["claims"])
    assert [row["step"] for row in numbers["training"]] == [2, 4]

    model = load_analysis_model(str(tmp_path / "mmdit"))
    scenes = [sample_scene("test", seed) for seed in range(2)]
    latents, texts = model.latents([render(scene) for scene in scenes]), ["a red star", "a blue circle"]
    taps = study.taps_of(2)
    whole = study.read_halves(model, latents, texts, taps, 180, study.WHOLE)
    full = {map.tap: map.values for map in read_features(model.tower, latents, model.prompts(texts), taps, [180], [1])}
    for name, (empty, given) in whole.items():
        assert not torch.equal(empty, given)
        pooled = nn.functional.adaptive_avg_pool2d(full[name].permute(0, 3, 1, 2), 2).flatten(2).transpose(1, 2)
        torch.testing.assert_close(given, pooled, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(study, "UNPOOLED", study.UNATTENDED)  # text cannot reach the image any more
    for empty, given in study.read_halves(model, latents, texts, taps, 180, study.UNATTENDED).values():
        assert torch.equal(empty, given)
