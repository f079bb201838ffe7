"""The diffusion tower: noise, prompts, guidance, ensembles, and what is cut and frozen."""

import pytest
import tiny
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import safe_open
from transformers import CLIPTokenizer

from sdllava import SDLlavaDiffusionModel, SDLlavaForConditionalGeneration
from sdllava.grids import resize_grid
from sdllava.guidance import guide
from sdllava.taps import list_taps


def tower(kind: str = "sd2", **fields) -> SDLlavaDiffusionModel:
    return SDLlavaDiffusionModel(tiny.diffusion_config(kind, **fields)).eval()


def ask(model: SDLlavaDiffusionModel, n: int = 2, seed: int = 0, **kwargs):
    inputs = tiny.image_inputs(n, seed)
    ids = inputs["diffusion_input_ids"]
    ids_2 = ids if model.config.text_encoder_2_config is not None else None
    with torch.no_grad():
        return model(inputs["diffusion_pixel_values"], ids, ids_2, **kwargs)


def count_parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def samples_through_unet(model: SDLlavaDiffusionModel) -> list[int]:
    counted: list[int] = []
    model.unet.conv_in.register_forward_pre_hook(lambda module, args: counted.append(len(args[0])))
    return counted


@pytest.mark.parametrize("schedule", ["scaled_linear", "linear", "squaredcos_cap_v2"])
def test_noisy_latents_equal_diffusers(schedule):
    model = tower(scheduler_config={**tiny.SCHEDULER, "beta_schedule": schedule})
    latents = torch.randn(3, 4, 8, 8)
    noise = model.noise(latents)
    scheduler = DDPMScheduler.from_config(model.config.scheduler_config)
    for timestep in (0, 50, 999):
        expected = scheduler.add_noise(latents, noise, torch.tensor([timestep] * 3))
        assert torch.equal(model.add_noise(latents, timestep, noise), expected)


def test_one_noise_map_for_all_images_or_one_for_each_seed():
    model = tower(noise_seed=7)
    latents = torch.zeros(3, 4, 8, 8)
    shared = model.noise(latents)
    assert torch.equal(shared[0], shared[2])
    assert torch.equal(shared[0], torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(7)))
    each = model.noise(latents, torch.tensor([7, 8, 7]))
    assert torch.equal(each[0], shared[0])
    assert torch.equal(each[0], each[2])
    assert not torch.equal(each[0], each[1])


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_text_embeddings_equal_the_stable_diffusion_pipeline(published, kind):
    model = SDLlavaDiffusionModel.from_component_pretrained(published[kind], taps=["U-L1-R1-B0-Cross-Q"], image_size=64)
    tokenizer = CLIPTokenizer.from_pretrained(published[kind], subfolder="tokenizer")
    pipe = StableDiffusionPipeline(
        model.vae, model.text_encoder, tokenizer, model.unet, DDIMScheduler(), None, None, requires_safety_checker=False
    )
    prompts = ["Is the dog facing left?", ""]
    with torch.no_grad():
        expected, null = pipe.encode_prompt(prompts, "cpu", 1, do_classifier_free_guidance=True)
    ids = tokenizer(prompts, padding="max_length", max_length=77, return_tensors="pt")["input_ids"]
    assert torch.equal(model.encode_prompts(ids)["encoder_hidden_states"], expected)
    torch.testing.assert_close(model.null_prompt()["encoder_hidden_states"][0], null[0], rtol=0, atol=1e-6)


def test_text_embeddings_equal_the_sdxl_pipeline(published):
    model = SDLlavaDiffusionModel.from_component_pretrained(published["sdxl"], taps=["U-L0-R0-B2-Out"], image_size=64)
    tokenizers = [CLIPTokenizer.from_pretrained(published["sdxl"], subfolder=f) for f in ("tokenizer", "tokenizer_2")]
    encoders = (model.text_encoder, model.backbone.text_encoder_2)
    pipe = StableDiffusionXLPipeline(model.vae, *encoders, *tokenizers, model.unet, DDIMScheduler())
    prompts = ["Is the dog facing left?", "How many?"]
    with torch.no_grad():
        expected, _, pooled, _ = pipe.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=False)
        expected_ids = pipe._get_add_time_ids((64, 64), (0, 0), (64, 64), torch.float32, 32)
    options = {"padding": "max_length", "max_length": 77, "return_tensors": "pt"}
    got = model.encode_prompts(*(tokenizer(prompts, **options)["input_ids"] for tokenizer in tokenizers))
    assert torch.equal(got["encoder_hidden_states"], expected)
    assert torch.equal(got["text_embeds"], pooled)

    seen = {}
    model.unet.register_forward_pre_hook(lambda m, args, kwargs: seen.update(kwargs), with_kwargs=True)
    ask(model)
    assert torch.equal(seen["added_cond_kwargs"]["time_ids"][:1], expected_ids)


def test_latents_are_the_scaled_mode():
    model = tower()
    pixels = tiny.image_inputs(2)["diffusion_pixel_values"]
    with torch.no_grad():
        expected = model.vae.encode(pixels).latent_dist.mode() * 0.18215
        same_layout = pixels.contiguous(memory_format=torch.channels_last)
        assert torch.equal(model.encode_latents(pixels), model.vae.encode(same_layout).latent_dist.mode() * 0.18215)
    torch.testing.assert_close(model.encode_latents(pixels), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "kind", [pytest.param("sd1", marks=pytest.mark.slow), "sd2", "sd2-v", pytest.param("sdxl", marks=pytest.mark.slow)]
)
def test_guidance_is_the_papers_formula(kind):
    both = ask(tower(kind, guidance_scales=[4.0]))
    unconditional, conditional = both.unconditional_features, both.conditional_features
    assert not torch.allclose(unconditional, conditional)
    torch.testing.assert_close(both.last_hidden_state, unconditional + 4 * (conditional - unconditional))


@pytest.mark.parametrize(
    ("scales", "kept", "expected"),
    [
        ([0.0], False, [3]),
        ([1.0], False, [3]),
        ([4.0], False, [6]),
        ([0.0, 1.0], False, [6]),
        ([0.0, 1.0, 4.0], True, [3]),
        ([4.0], True, [3]),
        ([1.0], True, [3]),
        ([0.0], True, []),
    ],
)
def test_how_many_samples_pass_through_the_unet(scales, kept, expected):
    model = tower(guidance_scales=scales, ensemble="mean")
    unconditional = torch.randn(3, 16, 64) if kept else None
    counted = samples_through_unet(model)
    ask(model, 3, unconditional_features=unconditional)
    assert counted == expected


def test_a_tiny_autoencoder_takes_the_vaes_place_and_is_saved(composed, tmp_path):
    fields = {"encoder_block_out_channels": (8, 8, 8, 8), "decoder_block_out_channels": (8, 8, 8, 8)}
    AutoencoderTiny(**fields).save_pretrained(tmp_path / "taesd")
    model = SDLlavaForConditionalGeneration.from_pretrained(composed)
    tiny_tower = model.model.diffusion_tower
    size = count_parameters(tiny_tower.vae)
    tiny_tower.use_tiny_vae(str(tmp_path / "taesd"))
    assert count_parameters(tiny_tower.vae) < size
    assert not any(p.requires_grad for p in tiny_tower.backbone.parameters())
    pixels = tiny.image_inputs(2)["diffusion_pixel_values"]
    with torch.no_grad():
        same_layout = pixels.contiguous(memory_format=torch.channels_last)
        expected = AutoencoderTiny.from_pretrained(tmp_path / "taesd").encode(same_layout).latents
    assert torch.equal(tiny_tower.encode_latents(pixels), expected)
    model.save_pretrained(tmp_path / "model")
    loaded = SDLlavaForConditionalGeneration.from_pretrained(tmp_path / "model").model.diffusion_tower
    torch.testing.assert_close(ask(loaded).last_hidden_state, ask(tiny_tower).last_hidden_state)


def test_an_autoencoder_of_other_latents_raises(tmp_path):
    AutoencoderTiny(latent_channels=16).save_pretrained(tmp_path / "taef1")
    with pytest.raises(ValueError, match="makes latents of 16 channels at 1/8"):
        tower().use_tiny_vae(str(tmp_path / "taef1"))
    with pytest.raises(OSError, match="Cannot read the tiny autoencoder from"):
        tower().use_tiny_vae(str(tmp_path))


@pytest.mark.parametrize(
    ("kind", "only_cross_attention", "through"),
    [
        pytest.param("sd1", False, (2, 2), marks=pytest.mark.slow),
        ("sd2", False, (2, 2)),
        ("sd2", [True, False, False, False], (2, 6)),
        ("sdxl", False, (6, 6)),  # its prompt enters the time embedding
    ],
)
def test_what_no_prompt_has_reached_is_computed_once(kind, only_cross_attention, through):
    """Prompts that share latents against each in a pass of its own, at every tap; the same with gradients recorded."""
    unet = tiny.diffusion_config(kind).unet_config | {"only_cross_attention": only_cross_attention}
    model = tower(kind, truncate=False, unet_config=unet)
    taps = list_taps(model.config.unet_config, 8)
    latents = torch.randn(2, 4, 8, 8)
    ids = tiny.prompt_ids(6)
    prompts = model.encode_prompts(ids, ids if kind == "sdxl" else None)
    attention = next(module for name, module in model.unet.named_modules() if name.endswith("attn1"))
    rows = []
    for module in (model.unet.down_blocks[0].resnets[0].conv1, attention.to_q):
        module.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    with torch.no_grad():
        shared = model.backbone.read(latents, 50, prompts, taps)
        blocks = [{name: x[i : i + 2] for name, x in prompts.items()} for i in (0, 2, 4)]
        separate = zip(*(model.backbone.read(latents, 50, block, taps) for block in blocks), strict=True)
    for tap, one, expected in zip(taps, shared, separate, strict=True):
        torch.testing.assert_close(one, torch.cat(expected), rtol=0, atol=1e-5, msg=tap.name)
    model.backbone.read(latents, 50, prompts, taps)
    assert rows == [*through, *[2] * 6, 6, 6]
    assert not any(m._forward_hooks for m in model.unet.modules())


@pytest.mark.parametrize("conditioning", ["none", "question"])
def test_without_a_prompt_the_features_are_unconditional(conditioning):
    model = tower(conditioning=conditioning)
    pixels = tiny.image_inputs(2)["diffusion_pixel_values"]
    ids = tiny.prompt_ids(2) if conditioning == "none" else None
    counted = samples_through_unet(model)
    with torch.no_grad():
        output = model(pixels, ids)
    assert output.conditional_features is None
    assert counted == [2]
    assert torch.equal(output.last_hidden_state, output.unconditional_features)


def test_the_empty_prompt_is_encoded_once_until_weights_change():
    model, other = tower(), tower()
    calls = []
    model.text_encoder.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    for _ in range(3):
        model.null_prompt()
    assert calls == [1]
    model.load_state_dict(other.state_dict())
    assert torch.equal(model.null_prompt()["encoder_hidden_states"], other.null_prompt()["encoder_hidden_states"])


def test_the_empty_prompt_is_encoded_every_time_under_zero_3():
    model = tower()
    model.backbone.prompt_weight.ds_id = 0
    calls = []
    model.text_encoder.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    for _ in range(2):
        model.null_prompt()
    assert calls == [1, 1]


def test_a_tower_built_in_inference_mode_answers_as_any_other():
    torch.manual_seed(0)
    expected = ask(tower()).last_hidden_state
    torch.manual_seed(0)
    with torch.inference_mode():
        assert torch.equal(ask(tower()).last_hidden_state, expected)


def test_ensembles_follow_the_order_tap_timestep_scale():
    taps, timesteps, scales = ["U-L1-R1-B0-Cross-Q", "U-L1-R1-B0-Out"], [50, 250], [0.0, 4.0]
    fields = {"taps": taps, "timesteps": timesteps, "guidance_scales": scales}
    together = {mode: tower(ensemble=mode, **fields) for mode in ("concat", "mean", "learned")}
    weights = together["concat"].state_dict()
    parts = []
    for tap in taps:
        for timestep in timesteps:
            one = tower(taps=[tap], timesteps=[timestep], guidance_scales=[4.0])
            names = one.state_dict().keys()
            one.load_state_dict({name: x for name, x in weights.items() if name in names}, strict=True)
            parts += [ask(one, guidance_scales=[scale]).last_hidden_state for scale in scales]
    expected = {
        "concat": torch.cat(parts, -1),
        "mean": torch.stack(parts).mean(0),
        "learned": torch.stack(parts).mean(0),
    }
    for mode, model in together.items():
        model.load_state_dict(weights, strict=False)
        assert model.config.hidden_size == expected[mode].shape[-1]
        torch.testing.assert_close(ask(model).last_hidden_state, expected[mode], rtol=1e-5, atol=1e-5)


def test_learned_weights_are_a_softmax_and_train():
    model = tower(ensemble="learned", guidance_scales=[0.0, 4.0])
    model.ensemble.weight.data = torch.tensor([0.0, 100.0])
    expected = ask(model).conditional_features
    base = ask(model).unconditional_features
    torch.testing.assert_close(ask(model).last_hidden_state, base + 4 * (expected - base))
    inputs = tiny.image_inputs(1)
    model.ensemble.weight.data.zero_()
    model(inputs["diffusion_pixel_values"], inputs["diffusion_input_ids"]).last_hidden_state.pow(2).sum().backward()
    assert model.ensemble.weight.grad.abs().sum() > 0


def test_resizing_to_the_grid_averages():
    grid = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert resize_grid(grid, 2).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


def test_features_do_not_depend_on_the_batch():
    model = tower()
    inputs = tiny.image_inputs(4)
    pixels, ids = inputs["diffusion_pixel_values"], inputs["diffusion_input_ids"]
    with torch.no_grad():
        batch = model(pixels, ids)
        for i in range(4):
            single = model(pixels[i : i + 1], ids[i : i + 1])
            for name in ("unconditional_features", "conditional_features"):
                torch.testing.assert_close(single[name], batch[name][i : i + 1], rtol=0, atol=1e-5)
            guided = batch.last_hidden_state[i : i + 1]
            assert (single.last_hidden_state - guided).norm() < 1e-5 * guided.norm()
        assert torch.equal(model(pixels, ids).last_hidden_state, batch.last_hidden_state)


def test_what_is_cut_is_neither_in_memory_nor_in_the_file(tmp_path):
    cut, whole = tower(), tower(truncate=False)
    names = set(cut.state_dict())
    gone = set(whole.state_dict()) - names
    assert any(".up_blocks.3." in name for name in gone)
    assert any(".conv_out." in name for name in gone)
    assert any("vae.decoder" in name for name in gone)
    assert not names - set(whole.state_dict())
    block = "backbone.unet.up_blocks.1.attentions.1.transformer_blocks.0"
    assert {f"{block}.attn2.to_q.weight", f"{block}.attn2.to_k.weight"} <= names
    assert f"{block}.attn2.to_v.weight" in gone
    assert f"{block}.ff.net.2.weight" in gone
    cut.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == names


def test_frozen_parts_hold_no_gradient_and_stay_in_evaluation_mode():
    model = tower().train()
    assert not any(p.requires_grad for p in model.backbone.parameters())
    assert not any(module.training for module in model.backbone.modules())


def test_gradients_reach_a_trainable_unet():
    model = tower()
    query = model.unet.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q")
    query.weight.requires_grad_(True)
    inputs = tiny.image_inputs(1)
    model(inputs["diffusion_pixel_values"], inputs["diffusion_input_ids"]).last_hidden_state.sum().backward()
    assert query.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("vae_in_fp32", "expected"),
    [(True, torch.float32), pytest.param(False, torch.bfloat16, marks=pytest.mark.slow)],
)
def test_the_vae_keeps_float32_in_half_precision(tmp_path, vae_in_fp32, expected):
    tower(vae_in_fp32=vae_in_fp32).save_pretrained(tmp_path)
    loaded = SDLlavaDiffusionModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert (loaded.vae.dtype, loaded.unet.dtype) == (expected, torch.bfloat16)
    reference = SDLlavaDiffusionModel.from_pretrained(tmp_path)
    features, exact = ask(loaded, guidance_scales=[1.0]), ask(reference, guidance_scales=[1.0])
    error = (features.last_hidden_state.float() - exact.last_hidden_state).norm() / exact.last_hidden_state.norm()
    assert features.last_hidden_state.dtype == torch.bfloat16
    assert error < 0.05


def test_guide_skips_what_a_scale_does_not_need():
    a, b = torch.zeros(1), torch.ones(1)
    assert guide(a, b, 0) is a
    assert guide(None, b, 1) is b
    assert guide(a, None, 4) is a
    assert guide(a, b, 4).item() == 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"timesteps": [1000]}, "Timestep 1000 is outside the training schedule. Use a value in 0..999"),
        ({"timesteps": [-1]}, "Timestep -1 is outside"),
        ({"taps": []}, "need at least one entry"),
        (
            {"text_encoder_2_config": tiny.TEXT_ENCODER},
            r"is given, .* 'stable_diffusion' has 1 text encoder\(s\)\. Leave",
        ),
        (
            {"unet_config": tiny.UNET_SDXL, "taps": None},
            r"is None, .* 'stable_diffusion_xl' has 2 text encoder\(s\)\. Give",
        ),
        ({"taps": ["U-L1-R1-B0-Cross-Q", "U-L3-R1-B0-Out"], "ensemble": "mean"}, "needs taps of equal channels"),
    ],
)
def test_bad_configurations_raise(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny.diffusion_config(**fields)


def test_a_wrong_number_of_scales_raises():
    with pytest.raises(ValueError, match=r"guidance_scales=\[0.0, 4.0\] has 2 entries, but this model combines 1"):
        ask(tower(), guidance_scales=[0.0, 4.0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": tiny.prompt_ids(3)}, r"There are 3 prompts for 2 image\(s\)\. Give one per image"),
        ({"noise_seed": torch.tensor([1, 2, 3])}, r"There are 3 noise_seeds for 2 image\(s\)"),
        ({"unconditional_features": torch.zeros(1, 16, 64)}, r"There are 1 unconditional_features for 2 image\(s\)"),
        ({"pixel_values": torch.zeros(2, 3, 32, 128)}, "Latents of 4 x 16 are not square"),
    ],
)
def test_rows_that_do_not_fit_raise(change, message):
    inputs = tiny.image_inputs(2)
    given = {"pixel_values": inputs["diffusion_pixel_values"], "input_ids": inputs["diffusion_input_ids"], **change}
    with pytest.raises(ValueError, match=message):
        tower()(**given)


def test_noise_and_empty_prompt_do_not_depend_on_the_surroundings():
    model, other = tower(), None
    expected, null = model.noise(torch.zeros(1, 4, 8, 8)), tower().null_prompt()["encoder_hidden_states"]
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(model.noise(torch.zeros(1, 4, 8, 8)), expected)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        other = model.null_prompt()["encoder_hidden_states"]
        ids = torch.tensor(model.config.null_prompt_ids[:1])
        assert torch.equal(model.encode_prompts(ids)["encoder_hidden_states"], other)
    assert other.dtype == null.dtype == torch.float32
    assert torch.equal(other, model.null_prompt()["encoder_hidden_states"])
