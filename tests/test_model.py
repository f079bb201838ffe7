"""The vision-language model: LLaVA's logits bit for bit, every way to generate, kept encodings, sizes."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch
from transformers import (
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    TextIteratorStreamer,
)

from sdllava import SDLlavaConfig, SDLlavaDiffusionModel, SDLlavaForConditionalGeneration, SDLlavaImageEncodings

IMAGE = 319


def build(diffusion="sd2", vision="clip", **fields) -> SDLlavaForConditionalGeneration:
    model = SDLlavaForConditionalGeneration(tiny.config(diffusion, vision, **fields)).eval()
    if model.config.fusion in ("cross_attention", "gated"):  # so that diffusion features reach the answer
        torch.nn.init.normal_(model.model.fusion.out_proj.weight)
    return model


def batch(model, images_per_row, seed: int = 0) -> dict:
    """Left-padded prompts with the given numbers of images, and the images."""
    generator = torch.Generator().manual_seed(seed)
    placeholder = [IMAGE] * model.config.num_image_tokens
    rows = []
    for row, images in enumerate(images_per_row):
        words = torch.randint(3, 300, (4 + row, max(images, 1)), generator=generator).T.tolist()
        rows.append([1] + [token for i in range(images) for token in [*placeholder, *words[i]]] + words[0])
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    inputs = tiny.image_inputs(sum(images_per_row), seed) if sum(images_per_row) else {}
    if model.config.vision_config is None:
        inputs.pop("pixel_values", None)
    if model.config.diffusion_config is None:
        inputs = {name: x for name, x in inputs.items() if name == "pixel_values"}
    elif model.config.diffusion_config.text_encoder_2_config is not None:
        inputs["diffusion_input_ids_2"] = inputs["diffusion_input_ids"]
    return {"input_ids": ids, "attention_mask": mask, **inputs}


def logits(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def answer(model, inputs, **options) -> torch.Tensor:
    return model.generate(**inputs, **{"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **options})


@pytest.fixture(scope="module")
def fused() -> SDLlavaForConditionalGeneration:
    torch.manual_seed(1)
    return build()


@pytest.mark.parametrize("strategy", ["default", "full"])
@pytest.mark.parametrize("layer", [-2, [-1, -2]])
def test_plain_llava_equals_transformers_bitwise(strategy, layer):
    fields = {"vision_feature_select_strategy": strategy, "vision_feature_layer": layer, "image_token_index": IMAGE}
    config = LlavaConfig(vision_config=tiny.vision_config(), text_config=tiny.text_config(), **fields)
    llava = LlavaForConditionalGeneration(config).eval()
    model = build(diffusion=None, **fields)
    model.load_state_dict(llava.state_dict())
    inputs = batch(model, [1, 2, 0])
    assert torch.equal(logits(model, inputs), logits(llava, inputs))
    assert torch.equal(answer(model, inputs), answer(llava, inputs))


@pytest.mark.parametrize(
    ("diffusion", "vision", "fields"),
    [
        pytest.param("sd1", "clip", {"fusion": "cross_attention"}, marks=pytest.mark.slow),
        pytest.param("sd2", "siglip", {"fusion": "concat"}, marks=pytest.mark.slow),
        ("sd2-v", "dinov2", {"fusion": "concat_tokens"}),
        pytest.param("sdxl", "clip", {"fusion": "gated"}, marks=pytest.mark.slow),
        pytest.param("sd2", None, {}, marks=pytest.mark.slow),
        pytest.param("sd2", None, {"spatial_merge_size": 2}, marks=pytest.mark.slow),
        ("sd2", "clip", {"fusion": "cross_attention", "fusion_grid_size": 2}),
        pytest.param("sd2", "clip", {"fusion": "concat", "spatial_merge_size": 2}, marks=pytest.mark.slow),
        (None, "siglip", {}),
        ("sd2", "clip", {"diffusion_fields": {"implicit_caption_tokens": 3}}),
    ],
)
def test_every_combination_answers_and_survives_a_round_trip(diffusion, vision, fields, tmp_path):
    model = build(diffusion, vision, **fields)
    inputs = batch(model, [1, 2, 0])
    model.save_pretrained(tmp_path)
    loaded = SDLlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    weights = model.state_dict()
    assert weights.keys() == loaded.state_dict().keys()
    assert all(torch.equal(x, weights[name]) for name, x in loaded.state_dict().items())
    # memory alignment of loaded weights picks other kernels, so logits may differ in the last bit
    torch.testing.assert_close(logits(loaded, inputs), logits(model, inputs), rtol=0, atol=1e-5)
    assert answer(model, inputs).shape[0] == 3


def test_bf16_and_sharded_round_trips_are_bitwise(fused, tmp_path):
    half = build()
    half.load_state_dict(fused.state_dict())
    half.to(torch.bfloat16).save_pretrained(tmp_path / "bf16", max_shard_size="200kB")
    assert (tmp_path / "bf16" / "model.safetensors.index.json").exists()
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "bf16", dtype="auto")
    expected = half.state_dict()
    for name, x in loaded.state_dict().items():
        assert torch.equal(x, expected[name].to(x.dtype)), name
        assert x.dtype == (torch.float32 if ".vae." in name else torch.bfloat16), name
    inputs = batch(loaded, [1])
    assert logits(loaded, inputs).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 3},
        {"cache_implementation": "static"},
        {"use_cache": False},
    ],
)
def test_a_padded_batch_answers_as_each_row_alone(fused, options):
    """Unequal numbers of images, a text-only row, every position."""
    inputs = batch(fused, [1, 0, 2])
    together = answer(fused, inputs, **options)[:, inputs["input_ids"].shape[1] :]
    first = 0
    for row, images in enumerate([1, 0, 2]):
        mask = inputs["attention_mask"][row].bool()
        single = {"input_ids": inputs["input_ids"][row][mask][None], "attention_mask": mask[mask].long()[None]}
        for name in ("pixel_values", "diffusion_pixel_values", "diffusion_input_ids"):
            if images:
                single[name] = inputs[name][first : first + images]
        first += images
        expected = answer(fused, single, **options)[:, single["input_ids"].shape[1] :]
        each = len(expected)
        got = together[row * each : (row + 1) * each]
        length = min(got.shape[1], expected.shape[1])
        assert torch.equal(got[:, :length], expected[:, :length])


def test_the_encoders_run_once_and_before_the_first_token(fused):
    calls = []
    handle = fused.model.diffusion_tower.register_forward_hook(lambda *a: calls.append("diffusion"))
    other = fused.model.vision_tower.register_forward_hook(lambda *a: calls.append("vision"))
    answer(fused, batch(fused, [1, 1]), num_beams=2)
    handle.remove(), other.remove()
    assert calls == ["vision", "diffusion"]


def test_sampling_is_repeatable_and_streams(fused):
    inputs = batch(fused, [1])
    draws = []
    for _ in range(2):
        torch.manual_seed(3)
        draws.append(answer(fused, inputs, do_sample=True, temperature=2.0))
    assert torch.equal(*draws)
    streamer = TextIteratorStreamer(tiny.language_tokenizer(), skip_prompt=True)
    expected = answer(fused, inputs, streamer=streamer)[0, inputs["input_ids"].shape[1] :]
    assert "".join(streamer) == tiny.language_tokenizer().decode(expected)


def test_two_runs_are_bitwise_the_same(fused):
    inputs = batch(fused, [2, 1])
    assert torch.equal(logits(fused, inputs), logits(fused, inputs))


def test_kept_encodings_give_the_same_answer_for_one_conditional_pass(fused):
    inputs = batch(fused, [1, 1])
    expected, tokens = logits(fused, inputs), answer(fused, inputs)
    pixels = {name: inputs.pop(name) for name in ("pixel_values", "diffusion_pixel_values")}
    encodings = fused.encode_images(**pixels)
    counted = []
    hook = fused.model.diffusion_tower.unet.conv_in.register_forward_pre_hook(lambda m, a: counted.append(len(a[0])))
    assert torch.equal(answer(fused, {**inputs, "image_encodings": encodings.to("cpu")}), tokens)
    torch.testing.assert_close(logits(fused, {**inputs, "image_encodings": encodings}), expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        kept = fused.get_image_features(image_encodings=encodings, diffusion_input_ids=inputs["diffusion_input_ids"])
        fresh = fused.get_image_features(**pixels, diffusion_input_ids=inputs["diffusion_input_ids"])
    assert (kept.last_hidden_state - fresh.last_hidden_state).norm() < 1e-5 * fresh.last_hidden_state.norm()
    hook.remove()
    assert counted == [2, 2, 2, 4]
    rows = encodings.rows()
    swapped = SDLlavaImageEncodings.cat([rows[1], rows[0]])
    assert torch.equal(swapped.latents, encodings.latents.flip(0))
    assert len(rows) == 2


def test_guidance_scales_can_be_chosen_per_call(fused):
    inputs = batch(fused, [1])
    at_zero = logits(fused, {**inputs, "diffusion_guidance_scales": [0.0]})
    other_prompt = {**inputs, "diffusion_input_ids": tiny.prompt_ids(1, seed=9), "diffusion_guidance_scales": [0.0]}
    assert torch.equal(at_zero, logits(fused, other_prompt))
    assert not torch.allclose(at_zero, logits(fused, inputs))
    assert answer(fused, inputs, diffusion_guidance_scales=[0.0]).shape[0] == 1


def test_features_computed_beforehand_and_inputs_embeds(fused):
    inputs = batch(fused, [1])
    expected = logits(fused, inputs)
    images = {name: x for name, x in inputs.items() if "pixel" in name or "diffusion" in name}
    text = {name: x for name, x in inputs.items() if name not in images}
    with torch.no_grad():
        features = fused.get_image_features(**images)
    assert [tuple(x.shape) for x in features.pooler_output] == [(16, 32)]
    assert torch.equal(logits(fused, {**text, "mm_encoder_outputs": {"image": features}}), expected)
    embeds = fused.get_input_embeddings()(text.pop("input_ids"))
    assert torch.equal(logits(fused, {**text, **images, "inputs_embeds": embeds}), expected)
    assert answer(fused, {**text, **images, "inputs_embeds": embeds}).shape == (1, 6)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations_agree(fused, implementation, tmp_path):
    fused.save_pretrained(tmp_path)
    model = SDLlavaForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=implementation).eval()
    assert model.model.language_model.config._attn_implementation == implementation
    inputs = batch(fused, [1])
    torch.testing.assert_close(logits(model, inputs), logits(fused, inputs), rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = build(diffusion_fields={"implicit_caption_tokens": 2}).train()
        model.set_stage("finetune")
        if checkpointing:
            model.gradient_checkpointing_enable()
        inputs = batch(model, [1])
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any("implicit_captioner" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_the_implicit_captioners_gradient_agrees_with_finite_differences():
    """Through the frozen UNet, along the gradient's own direction."""
    model = build(diffusion_fields={"implicit_caption_tokens": 2})
    inputs = batch(model, [1])

    def loss() -> torch.Tensor:
        return model(**inputs, labels=inputs["input_ids"]).loss

    weights = list(model.model.implicit_captioner.parameters())
    gradients = torch.autograd.grad(loss(), weights)
    norm = torch.stack([g.norm() for g in gradients]).norm()
    step, values = 0.1 / norm, []
    with torch.no_grad():
        for sign in (1, -1, 0):
            shifted = [w.clone() for w in weights]
            for weight, gradient in zip(weights, gradients, strict=True):
                weight += sign * step * gradient
            values.append(loss().item())
            for weight, before in zip(weights, shifted, strict=True):
                weight.copy_(before)
    assert norm > 0
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(norm.item() ** 2, rel=0.05)


@pytest.mark.parametrize("stage", ["align", "finetune"])
def test_a_stage_says_what_trains(stage):
    model = build(diffusion_fields={"ensemble": "learned", "guidance_scales": [0, 4], "implicit_caption_tokens": 2})
    model.set_stage(stage)
    trained = {
        name.split(".")[1] if name.startswith("model") else name
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    expected = {"multi_modal_projector", "fusion", "implicit_captioner", "diffusion_tower"}
    assert trained == (expected | {"language_model", "lm_head.weight"} if stage == "finetune" else expected)
    inside = [name for name, p in model.model.diffusion_tower.named_parameters() if p.requires_grad]
    assert inside == ["ensemble.weight"]
    with pytest.raises(ValueError, match=r"There is no stage 'both'\. Use 'align' or 'finetune'"):
        model.set_stage("both")


@pytest.mark.parametrize(
    ("family", "tied"),
    [
        pytest.param(LlamaConfig, False, marks=pytest.mark.slow),
        pytest.param(LlamaConfig, True, marks=pytest.mark.slow),
        pytest.param(Qwen2Config, False, marks=pytest.mark.slow),
        (Qwen2Config, True),
        (MistralConfig, False),
        pytest.param(MistralConfig, True, marks=pytest.mark.slow),
    ],
)
def test_language_models_of_three_families(family, tied, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = family(vocab_size=320, num_key_value_heads=2, pad_token_id=0, tie_word_embeddings=tied, **sizes)
    model = build(text_config=text)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    inputs = batch(model, [1, 2])
    assert answer(model, inputs).shape[0] == 2
    model.save_pretrained(tmp_path)
    loaded = SDLlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
    torch.testing.assert_close(logits(loaded, inputs), logits(model, inputs), rtol=0, atol=1e-5)


def test_device_map_on_the_cpu(fused, tmp_path):
    fused.save_pretrained(tmp_path)
    model = SDLlavaForConditionalGeneration.from_pretrained(tmp_path, device_map={"": "cpu"}).eval()
    inputs = batch(fused, [1])
    assert torch.equal(answer(model, inputs), answer(fused, inputs))


def test_offloaded_weights_give_the_same_answer(tmp_path):
    """Also those of the projector, whose device the features of a model with only a diffusion tower follow."""
    model = build(vision=None, fusion="none")
    model.save_pretrained(tmp_path / "model")
    offloaded = SDLlavaForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory={"cpu": 1000}, offload_folder=str(tmp_path / "offload")
    ).eval()
    assert offloaded.model.multi_modal_projector.linear_1.weight.device.type == "meta"
    inputs = batch(model, [1])
    assert torch.equal(answer(offloaded, inputs), answer(model, inputs))


def test_prompt_lookup_never_proposes_an_image(fused):
    inputs = batch(fused, [2])
    expected = answer(fused, inputs, max_new_tokens=8)
    assert torch.equal(answer(fused, inputs, max_new_tokens=8, prompt_lookup_num_tokens=2), expected)


@pytest.mark.slow
def test_compiled_language_model_gives_the_same_tokens(fused):
    compiled = torch.compile(fused.model.language_model, backend="eager", fullgraph=True)
    inputs = batch(fused, [1])
    with torch.no_grad():
        embeds = fused.get_input_embeddings()(inputs["input_ids"])
        expected = fused.model.language_model(inputs_embeds=embeds).last_hidden_state
        assert torch.equal(compiled(inputs_embeds=embeds).last_hidden_state, expected)


@pytest.mark.slow
def test_full_size_parts_have_the_published_numbers_of_parameters():
    with torch.device("meta"):
        config = SDLlavaConfig()
        cut = SDLlavaForConditionalGeneration(config)
        config.diffusion_config.truncate = False
        model = SDLlavaForConditionalGeneration(config)

    def count(module: torch.nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    tower, body = model.model.diffusion_tower, model.model
    assert count(tower.unet) == 865_910_724
    assert count(tower.vae) == 83_653_863
    assert count(tower.text_encoder) == 340_387_840
    assert count(body.vision_tower) == 303_507_456
    assert count(body.language_model) + count(model.lm_head) == 6_738_415_616
    assert 657e6 < count(cut.model.diffusion_tower.unet) < 659e6
    assert count(cut.model.diffusion_tower.vae) == 34_163_592 + 72
    assert config.num_image_tokens == 576


def test_images_of_one_encoder_only_raise(fused):
    inputs = batch(fused, [2])
    inputs["diffusion_pixel_values"] = inputs["diffusion_pixel_values"][:1]
    inputs["diffusion_input_ids"] = inputs["diffusion_input_ids"][:1]
    with pytest.raises(
        ValueError, match=r"There are 2 image\(s\) for the vision encoder and 1 for the diffusion model"
    ):
        logits(fused, inputs)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"input_ids": torch.tensor([[1, 5, 6]])},
            RuntimeError,
            "The text holds 0 image placeholders, but the images give",
        ),
        ({"input_ids": None}, ValueError, "Give exactly one of input_ids and inputs_embeds, not none"),
        ({"pixel_values": None}, ValueError, "has a vision encoder. Give pixel_values"),
        ({"diffusion_pixel_values": None}, ValueError, "has a diffusion tower. Give diffusion_pixel_values"),
    ],
)
def test_bad_inputs_raise(fused, change, error, message):
    inputs = {**batch(fused, [1]), **change}
    if "input_ids" in change:
        inputs.pop("attention_mask")
    with pytest.raises((error, ValueError), match=message):
        logits(fused, inputs)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"diffusion": None, "vision": None}, "needs at least one encoder"),
        ({"fusion": "none"}, "fusion='none' does not fit two encoders"),
        ({"vision": None, "fusion": "concat"}, "fusion='concat' does not fit one encoder. Use 'none'"),
        ({"vision": "siglip", "vision_feature_select_strategy": "default"}, "drops the CLS token"),
        ({"fusion_num_attention_heads": 5}, "fusion_num_attention_heads=5 does not divide"),
        ({"spatial_merge_size": 3}, "spatial_merge_size=3 does not divide the 4 x 4 grid"),
        ({"vision_feature_layer": [-2, -9]}, r"vision_feature_layer=-9 does not exist: .* Use a number in -"),
    ],
)
def test_parts_that_do_not_fit_raise(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny.config(**fields)


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_quantisation_touches_the_language_model_only(bits, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is optional")
    wide = build(text_config=tiny.text_config(hidden_size=64, intermediate_size=128))
    wide.save_pretrained(tmp_path)
    options = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    model = SDLlavaForConditionalGeneration.from_pretrained(tmp_path, quantization_config=options).eval()
    kind = bitsandbytes.nn.Linear4bit if bits == 4 else bitsandbytes.nn.Linear8bitLt
    quantised = {name for name, module in model.named_modules() if isinstance(module, kind)}
    linear = {name for name, module in wide.model.language_model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert quantised == {f"model.language_model.{name}" for name in linear}
    assert answer(model, batch(model, [1])).shape[0] == 1


def test_several_turns_continue_from_the_cache(fused):
    """A second turn over a filled cache gives what the whole conversation gives."""
    inputs = batch(fused, [1])
    with torch.no_grad():
        first = fused(**inputs, use_cache=True)
        more = torch.tensor([[7, 8, 9]])
        mask = torch.ones(1, inputs["input_ids"].shape[1] + 3, dtype=torch.long)
        second = fused(input_ids=more, attention_mask=mask, past_key_values=first.past_key_values).logits
    whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], more], dim=1), "attention_mask": mask}
    torch.testing.assert_close(second, logits(fused, whole)[:, -3:], rtol=1e-4, atol=1e-5)


def test_weights_that_were_cut_away_are_not_made_up(fused, tmp_path):
    fused.save_pretrained(tmp_path)
    for change in ({"taps": ["U-L2-R1-B0-Out"]}, {"truncate": False}):
        config = SDLlavaConfig.from_pretrained(tmp_path)
        for name, value in change.items():
            setattr(config.diffusion_config, name, value)
        with pytest.raises(ValueError, match=r"lacks \d+ frozen weights that this configuration needs"):
            SDLlavaForConditionalGeneration.from_pretrained(tmp_path, config=config)


def test_only_the_tower_is_read_from_a_whole_checkpoint(fused, tmp_path):
    fused.save_pretrained(tmp_path)
    tower = SDLlavaDiffusionModel.from_pretrained(tmp_path, config=fused.config.diffusion_config)
    expected = fused.model.diffusion_tower.state_dict()
    assert tower.state_dict().keys() == expected.keys()
    assert all(torch.equal(x, expected[name]) for name, x in tower.state_dict().items())


def test_threads_do_not_read_each_others_images(fused):
    inputs = [batch(fused, [1], seed) for seed in range(4)]
    expected = [logits(fused, x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda x: logits(fused, x), inputs * 5))
    assert all(torch.equal(x, expected[i % 4]) for i, x in enumerate(got))


def test_encoders_are_frozen_after_loading_too(fused, tmp_path):
    fused.save_pretrained(tmp_path)
    for model in (fused, SDLlavaForConditionalGeneration.from_pretrained(tmp_path)):
        frozen = [model.model.vision_tower, model.model.diffusion_tower.backbone]
        assert not any(p.requires_grad for part in frozen for p in part.parameters())
        assert all(p.requires_grad for p in model.model.multi_modal_projector.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_cpus_answer(fused):
    inputs = batch(fused, [1, 2])
    expected = logits(fused, inputs)
    model = copy.deepcopy(fused).to("cuda")
    got = logits(model, {name: x.to("cuda") for name, x in inputs.items()}).cpu()
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
