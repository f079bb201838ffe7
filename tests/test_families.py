"""Diffusion transformers: every part equals the stock pipeline's, taps equal hooks on the whole stock model."""

import json

import pytest
import tiny
import tiny_families
import torch
from diffusers import DDPMScheduler, PixArtAlphaPipeline, PixArtSigmaPipeline, PixArtTransformer2DModel
from safetensors import safe_open
from transformers import AutoTokenizer, T5EncoderModel

from sdllava import SDLlavaDiffusionConfig, SDLlavaDiffusionModel
from sdllava.backbones import read_published
from sdllava.families import PixArt
from sdllava.prompts import clean_prompts
from sdllava.unet_pass import CutAway

TAP = "T-B1-Cross-Q"
FIELDS = {"taps": [TAP], "image_size": 64, "grid_size": 4}
PROMPTS = ["  A red CUBE left of a sphere? ", "a", "", "cat <pad> dog"]


@pytest.fixture(scope="module")
def pixart(build_once):
    """A tiny PixArt-alpha in the published layout."""
    return build_once("pixart", tiny_families.save_pixart)


@pytest.fixture(scope="module")
def whole(pixart):
    return SDLlavaDiffusionModel.from_component_pretrained(str(pixart), **FIELDS)


@pytest.fixture
def images():
    return torch.rand(3, 3, 64, 64) * 2 - 1


def prompt_ids(folder, prompts=PROMPTS):
    (tokenizer,) = read_published(str(folder), **FIELDS).tokenizers
    cleaned = clean_prompts(tokenizer, prompts)
    return tokenizer(cleaned, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]


def stock_pass(tower, tap, noisy, timestep, prompts):
    """The tap's value in a pass of the whole stock transformer."""
    model, read = tower.backbone.transformer, []
    module = model.get_submodule(tap.module_path)
    if tap.is_input:
        handle = module.register_forward_pre_hook(lambda m, args: read.append(args[0]))
    else:
        handle = module.register_forward_hook(lambda m, args, output: read.append(output))
    try:
        model(
            noisy,
            prompts["encoder_hidden_states"],
            torch.tensor([timestep] * len(noisy)),
            {"resolution": None, "aspect_ratio": None},
            encoder_attention_mask=prompts["encoder_attention_mask"],
        )
    finally:
        handle.remove()
    return read[0]


@torch.no_grad()
def test_every_tap_of_pixart_equals_a_hook_on_the_whole_stock_model(pixart, whole, images):
    taps = whole.config.all_taps()
    assert [tap.name for tap in taps[:4]] == ["T-B0-Norm", "T-B0-Cross-Q", "T-B0-Cross-Out", "T-B0-Out"]
    prompts = whole.encode_prompts(prompt_ids(pixart)[:3])
    noisy = torch.randn(3, 4, 8, 8)
    read = whole.backbone.read(noisy, 50, prompts, taps)
    for tap, features in zip(taps, read, strict=True):
        assert torch.equal(features, stock_pass(whole, tap, noisy, 50, prompts)), tap
        assert features.shape == (3, tap.height * tap.width, tap.channels)


@torch.no_grad()
def test_taps_of_a_pixart_of_several_resolutions_get_the_image_size(tmp_path):
    """PixArt-alpha at 1024 pixels reads height, width and aspect ratio, as its pipeline gives them."""
    sizes = {"num_attention_heads": 3, "cross_attention_dim": 48}  # a third for each of the three numbers
    folder = tiny_families.save_pixart(tmp_path, use_additional_conditions=True, **sizes)
    tower = SDLlavaDiffusionModel.from_component_pretrained(str(folder), **FIELDS)
    prompts, noisy, expected = tower.encode_prompts(prompt_ids(folder)[:2]), torch.randn(2, 4, 8, 8), []
    handle = tower.backbone.transformer.transformer_blocks[1].register_forward_hook(lambda m, a, o: expected.append(o))
    size = {"resolution": torch.tensor([[64.0, 64.0]] * 2), "aspect_ratio": torch.ones(2, 1)}
    rows = [prompts[name] for name in ("encoder_hidden_states", "encoder_attention_mask")]
    tower.backbone.transformer(noisy, rows[0], torch.tensor([50, 50]), size, encoder_attention_mask=rows[1])
    handle.remove()
    (tap,) = (tap for tap in tower.config.all_taps() if tap.name == "T-B1-Out")
    assert torch.equal(tower.backbone.read(noisy, 50, prompts, [tap])[0], expected[0])


def test_the_adaln_tap_is_the_normalised_block_input(pixart, whole):
    prompts = whole.encode_prompts(prompt_ids(pixart)[:1])
    noisy, block = torch.randn(1, 4, 8, 8), whole.backbone.transformer.transformer_blocks[1]
    by_name = {tap.name: tap for tap in whole.config.all_taps()}
    norm, before = whole.backbone.read(noisy, 50, prompts, [by_name["T-B1-Norm"], by_name["T-B0-Out"]])
    timestep = whole.backbone.transformer.adaln_single(
        torch.tensor([50]), {"resolution": None, "aspect_ratio": None}, batch_size=1, hidden_dtype=torch.float32
    )[0]
    shift, scale = (block.scale_shift_table[None] + timestep.reshape(1, 6, -1)).chunk(6, dim=1)[:2]
    torch.testing.assert_close(norm, block.norm1(before) * (1 + scale) + shift)


@pytest.mark.parametrize(("kind", "length"), [("alpha", 120), pytest.param("sigma", 300, marks=pytest.mark.slow)])
@torch.no_grad()
def test_prompts_equal_the_pipeline_of_pixart(tmp_path, kind, length):
    folder = tiny_families.save_pixart(tmp_path / kind, kind)
    tower = SDLlavaDiffusionModel.from_component_pretrained(str(folder), **FIELDS)
    pipeline = {"alpha": PixArtAlphaPipeline, "sigma": PixArtSigmaPipeline}[kind](
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder=T5EncoderModel.from_pretrained(folder / "text_encoder"),
        vae=tower.backbone.vae, transformer=tower.backbone.transformer, scheduler=None,
    )  # fmt: skip
    found = tower.encode_prompts(prompt_ids(folder))
    expected, mask, null, null_mask = pipeline.encode_prompt(PROMPTS, device="cpu")
    assert found["encoder_hidden_states"].shape == (4, length, 32)
    assert torch.equal(found["encoder_hidden_states"], expected)
    assert torch.equal(found["encoder_attention_mask"], mask)
    assert torch.equal(tower.null_prompt()["encoder_attention_mask"], null_mask[:1])
    torch.testing.assert_close(tower.null_prompt()["encoder_hidden_states"], null[:1], rtol=0, atol=1e-6)


def test_noise_of_pixart_equals_the_training_schedule(whole):
    latents, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    scheduler = DDPMScheduler(**tiny_families.LINEAR_SCHEDULE)
    for timestep in (0, 50, 999):
        expected = scheduler.add_noise(latents, noise, torch.tensor([timestep]))
        torch.testing.assert_close(whole.add_noise(latents, timestep, noise), expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_question_gives_the_same_features_in_any_batch(pixart, whole, images):
    ids = prompt_ids(pixart)[:3]
    together = whole(images, ids).last_hidden_state
    assert together.shape == (3, 16, 32)
    assert not torch.allclose(together[0], whole(images[:1], ids[1:2]).last_hidden_state[0], atol=1e-3)
    order = [2, 0, 1]
    torch.testing.assert_close(whole(images[order], ids[order]).last_hidden_state, together[order], rtol=0, atol=1e-5)
    for row in range(3):
        alone = whole(images[row : row + 1], ids[row : row + 1]).last_hidden_state
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-5)


@torch.no_grad()
def test_what_comes_after_the_tap_is_neither_in_memory_nor_in_the_file(pixart, whole, images, tmp_path):
    tower = SDLlavaDiffusionModel.from_component_pretrained(str(pixart), truncate=True, **FIELDS)
    ids = prompt_ids(pixart)[:3]
    expected = whole(images, ids).last_hidden_state
    assert torch.equal(tower(images, ids).last_hidden_state, expected)
    transformer = tower.backbone.transformer
    assert isinstance(transformer.transformer_blocks[2], CutAway)
    assert isinstance(transformer.transformer_blocks[1].ff, CutAway)
    assert isinstance(transformer.transformer_blocks[1].attn2.to_v, CutAway)
    assert isinstance(transformer.transformer_blocks[1].attn2.to_k, torch.nn.Linear)  # for attention maps
    assert isinstance(tower.backbone.vae.decoder, CutAway)
    tower.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert not [name for name in names if "transformer_blocks.2." in name or "proj_out" in name or "decoder" in name]
    loaded, info = SDLlavaDiffusionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(loaded(images, ids).last_hidden_state, expected)  # position embeddings are computed again


def test_the_published_pixart_has_its_parameters_before_the_cut():
    config = {**tiny_families.PIXART, "num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72}
    config |= {"cross_attention_dim": 1152, "caption_channels": 4096, "sample_size": 64}
    with torch.device("meta"):
        transformer = PixArtTransformer2DModel(**config)
    assert sum(p.numel() for p in transformer.parameters()) == 610_856_096
    taps = PixArt().list_taps({"transformer_config": transformer.config}, 64)
    assert {(tap.height, tap.channels) for tap in taps} == {(32, 1152)}


def test_a_published_configuration_survives_saving(pixart, tmp_path):
    config = read_published(str(pixart), **FIELDS).config
    assert config.family.name == "pixart"
    assert config.prompt_width == 32
    assert config.latent_size == 8
    config.save_pretrained(tmp_path)
    again = SDLlavaDiffusionConfig.from_pretrained(tmp_path)
    assert again.part_configs == config.part_configs
    assert again.null_input_ids == config.null_input_ids == [1] + [0] * 119


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"taps": ["U-L1-R1-B0-Cross-Q"]}, r"no tap 'U-L1-R1-B0-Cross-Q' in this denoiser\. The nearest are .*T-B"),
        ({"image_size": 72}, r"image_size=72 is not a whole number of patches of 16 pixels"),
        ({"timesteps": [1000]}, r"Timestep 1000 is outside the training schedule\. Use a value in 0\.\.999"),
    ],
)
def test_fields_that_do_not_fit_pixart_raise(pixart, fields, message):
    with pytest.raises(ValueError, match=message):
        read_published(str(pixart), **{**FIELDS, **fields})


def test_missing_parts_and_unknown_transformers_raise(tmp_path):
    (tmp_path / "transformer").mkdir()
    config = tmp_path / "transformer/config.json"
    config.write_text(json.dumps({**tiny_families.PIXART, "_class_name": "PixArtTransformer2DModel"}))
    with pytest.raises(OSError, match="Cannot read the PixArt model"):
        read_published(str(tmp_path), **FIELDS)
    config.write_text(json.dumps({"_class_name": "SanaTransformer2DModel"}))
    with pytest.raises(ValueError, match=r"'SanaTransformer2DModel' is not supported\. Use one of PixArt"):
        read_published(str(tmp_path), **FIELDS)


def test_parts_that_do_not_fit_raise(tmp_path):
    folder = tiny_families.save_pixart(tmp_path, caption_channels=48)
    with pytest.raises(ValueError, match=r"prompts of width 48, but the text encoders give 32"):
        read_published(str(folder), **FIELDS)


@torch.no_grad()
def test_attention_maps_of_pixart_give_the_attention_output(pixart, whole, images):
    attention, outputs = whole.backbone.transformer.transformer_blocks[1].attn2, []
    handles = [attention.register_forward_hook(lambda m, args, output: outputs.append(output))]
    handles.append(attention.to_v.register_forward_hook(lambda m, args, output: outputs.append(output)))
    ids = prompt_ids(pixart)[:3]
    prompts = whole.encode_prompts(ids)
    noisy = whole.add_noise(whole.encode_latents(images), 50, whole.noise(torch.zeros(3, 4, 8, 8)))
    whole.backbone.denoise(whole.backbone.transformer, noisy, 50, prompts)
    for handle in handles:
        handle.remove()
    value, output = outputs
    with whole.capture_attention(layers=["T-B1"], per_head=True) as maps:
        whole(images, ids)
    probabilities = maps["T-B1", 50].flatten(3).transpose(2, 3)  # (n, heads, positions, tokens)
    torch.testing.assert_close(probabilities.sum(dim=-1), torch.ones(3, 2, 16), rtol=0, atol=1e-5)
    assert maps["T-B1", 50].shape == (3, 2, 120, 4, 4)
    padding = prompts["encoder_attention_mask"] == 0
    assert probabilities.amax(dim=(1, 2))[padding].max() < 1e-6
    rebuilt = (probabilities @ value.unflatten(2, (2, 16)).transpose(1, 2)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention.to_out[0](rebuilt), output, rtol=0, atol=1e-5)
    assert whole.attention_layers() == ["T-B0", "T-B1"]


def test_words_of_a_t5_prompt(pixart):
    from sdllava.analysis.attention import words_in_prompt

    (tokenizer,) = read_published(str(pixart), **FIELDS).tokenizers
    ids = prompt_ids(pixart, ["Red cube."])[0].tolist()
    words = words_in_prompt(tokenizer, ids)
    assert [word.text for word in words] == ["red", "cube.", "<end>", "<padding>"]
    assert [token for word in words for token in word.tokens] == list(range(120))


@torch.no_grad()
@pytest.mark.parametrize("kind", [pytest.param("sd1", marks=pytest.mark.slow), "sd2"])
def test_noise_free_features_of_a_stock_unet(published, images, kind):
    """CleanDIFT's UNets are stock UNets that read clean latents."""
    fields = {"taps": ["U-L1-Up-Out"], "image_size": 64, "grid_size": 4, "guidance_scales": [1], "timesteps": [261]}
    tower = SDLlavaDiffusionModel.from_component_pretrained(str(published[kind]), add_noise=False, **fields)
    ids, read = tiny.prompt_ids(3), []
    latents = tower.encode_latents(images)
    handle = tower.unet.up_blocks[1].upsamplers[0].register_forward_hook(lambda m, args, output: read.append(output))
    tower.unet(latents, 261, tower.text_encoder(ids).last_hidden_state)
    handle.remove()
    assert read[0].shape == (3, 64, 4, 4)
    expected = read[0].flatten(2).transpose(1, 2)
    features = tower(latents=latents, input_ids=ids, noise_seed=torch.tensor([1, 2, 3])).last_hidden_state
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)
    tower.config.add_noise = True
    assert not torch.allclose(tower(latents=latents, input_ids=ids).last_hidden_state, expected, atol=1e-3)
