"""Attention maps: exact probabilities, unchanged outputs, removed hooks, words, and maps over the image."""

import contextlib
import functools
import math

import numpy as np
import pytest
import tiny
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from sdllava import SDLlavaDiffusionModel, SDLlavaForConditionalGeneration, SDLlavaProcessor
from sdllava.analysis.attention import drawn_part, map_onto_image, model_attention, question_attention, question_heatmap
from sdllava.analysis.attention import words_in_prompt as words
from sdllava.analysis.loading import load_analysis_model
from sdllava.image_loading import pad_to_square


def tower(kind: str = "sd2", **fields) -> SDLlavaDiffusionModel:
    return SDLlavaDiffusionModel(tiny.diffusion_config(kind, **{"truncate": False, **fields})).eval()


@functools.cache
def truncated_tower(tap: str) -> SDLlavaDiffusionModel:
    return tower(taps=[tap], timesteps=[50, 500], truncate=True)


def call(model: SDLlavaDiffusionModel, n: int = 2, **kwargs):
    inputs = tiny.image_inputs(n)
    with torch.no_grad():
        return model(inputs["diffusion_pixel_values"], inputs["diffusion_input_ids"], **kwargs)


LAYERS = {
    "D-L0-R1-B0": "down_blocks.0.attentions.1.transformer_blocks.0.attn2",
    "M-L0-R0-B0": "mid_block.attentions.0.transformer_blocks.0.attn2",
    "U-L1-R1-B0": "up_blocks.1.attentions.1.transformer_blocks.0.attn2",
}


def whole_unet(model: SDLlavaDiffusionModel) -> UNet2DConditionModel:
    """A stock UNet with the weights of a truncated one."""
    unet = UNet2DConditionModel.from_config(model.config.unet_config).eval()
    missing = unet.load_state_dict(model.unet.state_dict(), strict=False)
    assert not missing.unexpected_keys
    return unet


def softmax_by_head(unet: UNet2DConditionModel, model, timestep: int, n: int) -> dict[str, torch.Tensor]:
    """Softmax of the queries and keys of each layer, head by head: `(n, heads, tokens, side, side)`."""
    read = {}
    handles = [
        getattr(unet.get_submodule(path), projection).register_forward_hook(
            lambda m, a, output, key=(layer, projection): read.update({key: output})
        )
        for layer, path in LAYERS.items()
        for projection in ("to_q", "to_k")
    ]
    inputs = tiny.image_inputs(n)
    with torch.no_grad():
        latents = model.encode_latents(inputs["diffusion_pixel_values"])
        noisy = model.add_noise(latents, timestep, model.noise(latents))
        unet(noisy, timestep, model.encode_prompts(inputs["diffusion_input_ids"])["encoder_hidden_states"])
    for handle in handles:
        handle.remove()
    found = {}
    for layer, path in LAYERS.items():
        query, key = read[layer, "to_q"], read[layer, "to_k"]
        heads = unet.get_submodule(path).heads
        width = query.shape[-1] // heads
        maps = []
        for row in range(n):
            for head in range(heads):
                part = slice(head * width, (head + 1) * width)
                scores = query[row][:, part] @ key[row][:, part].T / math.sqrt(width)
                maps.append(torch.exp(scores) / torch.exp(scores).sum(dim=-1, keepdim=True))
        stacked = torch.stack(maps).unflatten(0, (n, heads)).transpose(2, 3)
        side = math.isqrt(stacked.shape[-1])
        found[layer] = stacked.unflatten(3, (side, side))
    return found


@pytest.mark.parametrize("tap", ["U-L1-R1-B0-Cross-Q", "U-L1-R2-B0-Out"])
def test_probabilities_of_a_truncated_tower_equal_the_softmax_of_a_whole_unet(tap):
    model = truncated_tower(tap)
    with model.capture_attention(layers=list(LAYERS), per_head=True) as maps:
        call(model)
    assert sorted(maps) == [(layer, timestep) for layer in LAYERS for timestep in (50, 500)]
    unet = whole_unet(model)
    for timestep in (50, 500):
        for layer, expected in softmax_by_head(unet, model, timestep, 2).items():
            found = maps[layer, timestep]
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
            torch.testing.assert_close(found.sum(dim=2), torch.ones_like(found[:, :, 0]))


def test_heads_are_averaged_by_default():
    model = tower()
    with model.capture_attention() as maps:
        call(model)
    with model.capture_attention(per_head=True) as per_head:
        call(model)
    for key in maps:
        assert maps[key].shape[1] == 1
        torch.testing.assert_close(maps[key][:, 0], per_head[key].mean(dim=1))


@pytest.mark.parametrize("fields", [{}, {"guidance_scales": [1.0]}, {"guidance_scales": [0.0, 1.0, 4.0]}])
def test_only_the_conditional_half_is_kept_at_every_guidance_scale(fields):
    model = tower(**fields)
    with model.capture_attention() as maps:
        call(model)
    (prompts,) = maps.prompt_ids
    assert torch.equal(prompts, tiny.prompt_ids(2))
    expected = tower(guidance_scales=[1.0])
    expected.load_state_dict(model.state_dict())
    with expected.capture_attention() as only:
        call(expected)
    for key in only:
        torch.testing.assert_close(maps[key], only[key], rtol=0, atol=2e-6)


def test_implicit_caption_tokens_have_maps():
    model = tower()
    with model.capture_attention(["U-L1-R1-B0"]) as maps:
        call(model, implicit_caption=torch.randn(2, 3, 32))
    assert maps["U-L1-R1-B0", 50].shape[2] == 80
    torch.testing.assert_close(maps.average().sum(dim=1), torch.ones(2, 2, 2))


def test_a_call_without_prompt_keeps_no_maps_and_a_new_call_replaces_the_last():
    model = tower()
    with model.capture_attention() as maps:
        call(model, guidance_scales=[0.0])
        assert len(maps) == 0
        with pytest.raises(
            ValueError, match=r"No attention was captured\. Call the model with a question inside the context"
        ):
            maps.average()
        call(model, n=3)
        call(model, n=1)
    assert {len(value) for value in maps.values()} == {1}


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_outputs_are_unchanged_and_hooks_are_removed(kind):
    model = tower(kind)
    ids = tiny.prompt_ids(2)
    inputs = (tiny.image_inputs(2)["diffusion_pixel_values"], ids, ids if kind == "sdxl" else None)
    processors = dict(model.unet.attn_processors)
    with torch.no_grad():
        before = model(*inputs).last_hidden_state
        with contextlib.suppress(InterruptedError), model.capture_attention() as maps:
            assert torch.equal(model(*inputs).last_hidden_state, before)
            raise InterruptedError
        assert torch.equal(model(*inputs).last_hidden_state, before)
    assert len(maps) == len(maps.layers) > 3
    assert model.unet.attn_processors == processors
    for module in (model, *model.unet.modules()):
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_average_at_one_resolution():
    model = tower(taps=["U-L1-R2-B0-Out"], timesteps=[10, 500])
    with model.capture_attention() as maps:
        call(model)
    assert maps.resolutions == [1, 2, 4, 8]
    layers = ["D-L2-R0-B0", "D-L2-R1-B0", "U-L1-R0-B0", "U-L1-R1-B0", "U-L1-R2-B0"]  # S3, appendix D
    expected = torch.stack([maps[layer, t].mean(dim=1) for layer in layers for t in (10, 500)]).mean(dim=0)
    torch.testing.assert_close(maps.average(resolution=2), expected)
    one = maps.average(resolution=2, layers=["D-L2-R1-B0"], timesteps=[500])
    torch.testing.assert_close(one, maps["D-L2-R1-B0", 500].mean(dim=1))
    with pytest.raises(ValueError, match=r"No captured layer has the resolution 3\. Use one of \[1, 2, 4, 8\]"):
        maps.average(resolution=3)


def test_in_half_precision_and_under_autocast_rows_sum_to_one():
    model = tower()
    with model.capture_attention() as maps, torch.autocast("cpu", torch.bfloat16):
        call(model)
        under_autocast = dict(maps)
        model.backbone.unet.bfloat16()
        call(model)
    for kept in (under_autocast, maps):
        for value in kept.values():
            assert value.dtype == torch.float32
            torch.testing.assert_close(value.sum(dim=2), torch.ones_like(value[:, :, 0]))


@pytest.mark.parametrize("name", ["U-L1-R2-B0", "U-L3-R0-B0-Cross-Q", "nowhere"])
def test_a_layer_after_the_last_tap_raises_an_error_that_names_the_nearest(name):
    context = truncated_tower("U-L1-R1-B0-Cross-Q").capture_attention([name])
    with pytest.raises(
        ValueError,
        match=rf"No attention '{name}' to the prompt runs up to this tower's last tap\. The nearest that do are .*-B0",
    ):
        context.__enter__()


@pytest.mark.parametrize("pad_token", ["!", "<|endoftext|>"])
def test_words_join_their_tokens_and_special_tokens_stay_separate(pad_token):
    tokenizer = tiny.diffusion_tokenizer(pad_token)
    question = "Is the dog's leash réd!?"
    ids = tokenizer(question, padding="max_length", max_length=77)["input_ids"]
    found = words(tokenizer, ids)
    assert [w.text for w in found if not w.special] == ["is", "the", "dog", "'s", "leash", "réd", "!?"]
    assert [w.text for w in found if w.special] == ["<begin>", "<end>", "<padding>"]
    assert sorted(t for w in found for t in w.tokens) == list(range(77))
    dog = next(w for w in found if w.text == "dog")
    assert tokenizer.decode([ids[t] for t in dog.tokens]).strip() == "dog"
    assert len(dog.tokens) == 3
    full = tokenizer("word " * 100, padding="max_length", max_length=77, truncation=True)["input_ids"]
    assert sorted(t for w in words(tokenizer, full, 80) for t in w.tokens) == list(range(80))


@pytest.mark.parametrize("size", [(96, 32), (32, 96), (64, 64), (97, 40)])
def test_a_map_peaks_at_the_position_of_a_known_pixel(size):
    """The map is the padded image, averaged over the cells of a grid."""
    width, height = size
    for x, y in [(5, 5), (width - 9, height - 8), (width // 2, height // 3)]:
        picture = np.zeros((height, width, 3), np.uint8)
        picture[y : y + 4, x : x + 4] = 255
        square = pad_to_square(Image.fromarray(picture), (0, 0, 0))
        grid = np.asarray(square.resize((32, 32), Image.Resampling.BOX).convert("L"), np.float32)
        back = map_onto_image(grid, size)
        assert back.shape == (height, width)
        found = np.unravel_index(back.argmax(), back.shape)
        assert abs(found[0] - (y + 1.5)) <= 3
        assert abs(found[1] - (x + 1.5)) <= 3


def test_a_map_is_only_cropped_where_pixels_are_cells():
    grid = np.arange(64, dtype=np.float32).reshape(8, 8)
    assert np.array_equal(map_onto_image(grid, (8, 4)), grid[2:6])
    assert np.array_equal(map_onto_image(grid, (3, 8)), grid[:, 2:5])


def test_the_drawn_part_of_a_map_has_no_padding():
    grid = np.arange(64, dtype=np.float32).reshape(8, 8)
    assert np.array_equal(drawn_part(grid, (8, 4)), grid[2:6])
    assert drawn_part(grid, (100, 100)) is grid


@pytest.fixture(scope="module")
def loaded(composed) -> tuple[SDLlavaForConditionalGeneration, SDLlavaProcessor]:
    model = SDLlavaForConditionalGeneration.from_pretrained(composed).eval()
    return model, SDLlavaProcessor.from_pretrained(composed)


def test_question_attention_of_a_checkpoint_and_of_a_diffusion_model(composed, published, loaded):
    image = Image.effect_noise((40, 24), 80).convert("RGB")
    whole = load_analysis_model(str(published["sd2"]))
    found = question_attention(whole.tower, whole.processor, image, "a red dog?", timesteps=[10, 250], resolution=2)
    assert [w.text for w in found.words if not w.special] == ["a", "red", "dog", "?"]
    np.testing.assert_allclose(found.maps.sum(axis=0), 1, atol=1e-5)
    assert "t = 10, 250" in found.description
    assert "U-L1-R2-B0" in found.description
    np.testing.assert_allclose(found.question().grid, sum(found.word(w).grid for w in ("a", "red", "dog", "?")))
    assert found.word("dog").values.shape == (24, 40)
    with pytest.raises(ValueError, match=r"does not have the word 'cat'\. Use one of \['a', 'red', 'dog', '\?'\]"):
        found.word("cat")

    cut = load_analysis_model(str(composed))
    assert not hasattr(cut.tower, "language_model")
    assert cut.tower.config.truncate
    deepest = question_attention(cut.tower, cut.processor, image, "a red dog?", layers=["U-L1-R1-B0"])
    model, processor = loaded
    with torch.no_grad(), model.model.diffusion_tower.capture_attention(["U-L1-R1-B0"]) as maps:
        model.get_image_features(**processor(images=image, question="a red dog?", return_tensors="pt"))
    expected = maps.average()[0][list(deepest.words[3].tokens)].sum(dim=0).numpy()
    np.testing.assert_allclose(deepest.word("dog").grid, expected, atol=2e-6)


def test_question_heatmap_of_a_model(loaded, monkeypatch):
    model, processor = loaded
    image = Image.effect_noise((40, 24), 80).convert("RGB")
    heat = question_heatmap(model, processor, image, "a red dog?")
    assert heat.values.shape == (24, 40)
    assert heat.values.min() > 0
    assert heat.values.max() < 1
    pixels = processor(images=image, question="", return_tensors="pt")
    encodings = model.encode_images(pixels["pixel_values"], pixels["diffusion_pixel_values"])
    again = model_attention(model, processor, image, "a red dog?", image_encodings=encodings).question()
    np.testing.assert_allclose(again.grid, heat.grid, atol=2e-6)
    monkeypatch.setattr(model.model.diffusion_tower.config, "conditioning", "none")
    with pytest.raises(ValueError, match="only reads the empty prompt"):
        question_heatmap(model, processor, image, "a red dog?")
