"""DeepFloyd IF: every part equals the stock pipeline's, taps equal hooks on the whole stock model."""

import json

import pytest
import tiny_families
import torch
from diffusers import DDPMScheduler, IFPipeline
from safetensors import safe_open
from transformers import AutoTokenizer

from sdllava import SDLlavaDiffusionModel
from sdllava.backbones import read_published, read_whole
from sdllava.prompts import clean_prompts
from sdllava.unet_pass import CutAway

TAP = "U-L1-R0-B0-Cross-Q"
FIELDS = {"taps": [TAP], "image_size": 16, "grid_size": 4}
PROMPTS = [" A red CUBE? ", "a", "", "cat <pad> dog"]


@pytest.fixture(scope="module")
def folder(build_once):
    return build_once("deepfloyd_if", tiny_families.save_if)


@pytest.fixture(scope="module")
def whole(folder):
    return SDLlavaDiffusionModel.from_component_pretrained(str(folder), **FIELDS)


@pytest.fixture
def images():
    return torch.rand(3, 3, 16, 16) * 2 - 1


def prompt_ids(folder, prompts=PROMPTS):
    (tokenizer,) = read_published(str(folder), **FIELDS).tokenizers
    cleaned = clean_prompts(tokenizer, prompts)
    return tokenizer(cleaned, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]


@torch.no_grad()
def test_every_tap_equals_a_hook_on_the_whole_stock_model(folder, whole):
    taps, noisy = whole.config.all_taps(), torch.randn(3, 3, 16, 16)
    prompts = whole.encode_prompts(prompt_ids(folder)[:3])
    unet, order, outputs = whole.backbone.unet, [], {}
    handles = []
    for tap in taps:

        def keep(module, args, output, name=tap.name):
            order.append(name)
            outputs[name] = output

        handles.append(unet.get_submodule(tap.module_path).register_forward_hook(keep))
    unet(noisy, 100, prompts["encoder_hidden_states"])
    for handle in handles:
        handle.remove()
    assert order == [tap.name for tap in taps]  # in the order of the forward pass
    for tap, features in zip(taps, whole.backbone.read(noisy, 100, prompts, taps), strict=True):
        assert torch.equal(features, outputs[tap.name]), tap
        tokens = tap.name.endswith("Cross-Q")
        size = (tap.height * tap.width, tap.channels) if tokens else (tap.channels, tap.height, tap.width)
        assert features.shape == (3, *size)
    assert {"D-L0-R0-Res-Out", "D-L1-R1-B0-Cross-Q", "M-L0-R0-Vit-Out", "U-L0-R2-B0-Cross-Q"} <= set(outputs)
    assert "U-L0-R0-B0-Out" not in outputs


@torch.no_grad()
def test_prompts_equal_the_pipeline(folder, whole):
    pipeline = IFPipeline(
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"), text_encoder=whole.backbone.text_encoder,
        unet=whole.backbone.unet, scheduler=None, safety_checker=None, feature_extractor=None, watermarker=None,
        requires_safety_checker=False,
    )  # fmt: skip
    expected, null = pipeline.encode_prompt(PROMPTS, device="cpu")
    found = whole.encode_prompts(prompt_ids(folder))["encoder_hidden_states"]
    assert found.shape == (4, 77, 32)
    assert torch.equal(found, expected)
    torch.testing.assert_close(whole.null_prompt()["encoder_hidden_states"], null[:1], rtol=0, atol=1e-6)


@torch.no_grad()
def test_noise_and_prediction_equal_the_stock_parts(folder, whole, images):
    noise = torch.randn(3, 3, 16, 16)
    scheduler = DDPMScheduler.from_pretrained(folder / "scheduler")
    for timestep in (0, 50, 999):
        expected = scheduler.add_noise(images, noise, torch.tensor([timestep]))
        torch.testing.assert_close(whole.add_noise(images, timestep, noise), expected, rtol=0, atol=1e-6)
    assert torch.equal(whole.encode_latents(images), images)
    prompts = whole.encode_prompts(prompt_ids(folder)[:3])
    expected = whole.backbone.unet(noise, 100, prompts["encoder_hidden_states"]).sample
    assert expected.shape[1] == 6  # with a learned variance
    assert torch.equal(whole.backbone.predict(noise, 100, prompts), expected[:, :3])
    assert torch.equal(whole.backbone.prediction_target(images, noise, 100), noise)


@torch.no_grad()
def test_what_comes_after_the_tap_is_neither_in_memory_nor_in_the_file(folder, whole, images, tmp_path):
    tower = SDLlavaDiffusionModel.from_component_pretrained(str(folder), truncate=True, **FIELDS)
    ids = prompt_ids(folder)[:3]
    expected = whole(images, ids).last_hidden_state
    assert torch.equal(tower(images, ids).last_hidden_state, expected)
    attention = tower.backbone.unet.up_blocks[1].attentions[0]
    assert isinstance(tower.backbone.unet.up_blocks[2], CutAway)
    assert isinstance(attention.add_v_proj, CutAway)
    assert isinstance(attention.add_k_proj, torch.nn.Linear)  # for attention maps
    tower.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert not [name for name in names if "up_blocks.2." in name or "conv_out" in name]
    loaded, info = SDLlavaDiffusionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(loaded(images, ids).last_hidden_state, expected)
    moved = loaded(images[[2, 0, 1]], ids[[2, 0, 1]]).last_hidden_state
    torch.testing.assert_close(moved, expected[[2, 0, 1]], rtol=0, atol=5e-5)
    alone = loaded(images[1:2], ids[1:2]).last_hidden_state
    torch.testing.assert_close(alone[0], expected[1], rtol=0, atol=5e-5)
    assert not torch.allclose(loaded(images[1:2], ids[:1]).last_hidden_state[0], expected[1], atol=1e-3)


@torch.no_grad()
def test_attention_maps_are_the_text_part_of_the_attention(folder, whole, images):
    ids = prompt_ids(folder)[:3]
    with whole.capture_attention(layers=["U-L0-R2-B0"], per_head=True) as maps:
        whole(images, ids)
    found = maps["U-L0-R2-B0", 50].flatten(3).transpose(2, 3)  # (n, heads, positions, tokens)
    assert found.shape == (3, 4, 16, 77)
    noisy = whole.add_noise(images, 50, whole.noise(images))
    prompts, before = whole.encode_prompts(ids), []
    attention = whole.backbone.unet.up_blocks[0].attentions[2]
    for token in (0, 76):
        marked = torch.zeros(3, 77, 64)
        marked[:, token] = 1
        handles = [
            attention.add_v_proj.register_forward_hook(lambda m, a, o, marked=marked: marked),
            attention.to_v.register_forward_hook(lambda m, a, o: torch.zeros_like(o)),
            attention.to_out[0].register_forward_pre_hook(lambda m, args: before.append(args[0])),
        ]
        whole.backbone.denoise(whole.backbone.unet, noisy, 50, prompts)
        for handle in handles:
            handle.remove()
        probabilities = before[-1].unflatten(2, (4, 16))[..., 0].transpose(1, 2)
        torch.testing.assert_close(probabilities, found[..., token])
    assert whole.attention_layers()[0] == "D-L1-R0-B0"


def test_parts_that_do_not_fit_raise(folder, tmp_path):
    assert read_whole(str(folder)).config.taps == ["U-L1-R2-B0-Cross-Q"]
    with pytest.raises(ValueError, match=r"no tap 'T-B1-Norm' in this denoiser"):
        read_published(str(folder), **{**FIELDS, "taps": ["T-B1-Norm"]})
    with pytest.raises(ValueError, match="has no VAE to replace"):
        SDLlavaDiffusionModel.from_component_pretrained(str(folder), **FIELDS).use_tiny_vae("x")
    (tmp_path / "unet").mkdir()
    config = json.loads((folder / "unet/config.json").read_text())
    (tmp_path / "unet/config.json").write_text(json.dumps(config))
    with pytest.raises(OSError, match="Cannot read the DeepFloyd IF model"):
        read_published(str(tmp_path), **FIELDS)
    upscaler = tiny_families.save_if(tmp_path / "upscaler", in_channels=6)
    with pytest.raises(ValueError, match="The UNet takes 6 channels, so it is an upscaler"):
        read_published(str(upscaler), **FIELDS)
