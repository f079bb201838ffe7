"""Stable Diffusion 3 and FLUX: every part equals the stock pipeline's, taps equal hooks on the whole stock model."""

from typing import Any

import pytest
import tiny_families
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from safetensors import safe_open
from torch.nn import functional as F
from transformers import AutoTokenizer, BitsAndBytesConfig, CLIPTokenizer

from sdllava import SDLlavaDiffusionConfig, SDLlavaDiffusionModel, SDLlavaForConditionalGeneration
from sdllava.backbones import read_published, read_whole
from sdllava.families import Flux, StableDiffusion3
from sdllava.unet_pass import CutAway

KINDS = ("sd3", "flux")
TAPS = {"sd3": "T-B1-Joint-Q", "flux": "T-B2-Joint-Q"}
PROMPTS = ["A red cube?", "a", ""]
SIZES = {"image_size": 64, "grid_size": 4}


def fields(kind, **others):
    return {**SIZES, "taps": [TAPS[kind]], **others}


@pytest.fixture(scope="module")
def folders(build_once):
    """A tiny Stable Diffusion 3.5 and a tiny FLUX.1-dev in the published layout."""
    return {kind: build_once(kind, getattr(tiny_families, f"save_{kind}")) for kind in KINDS}


@pytest.fixture(scope="module")
def towers(folders):
    return {
        kind: SDLlavaDiffusionModel.from_component_pretrained(str(folder), **fields(kind))
        for kind, folder in folders.items()
    }


@pytest.fixture
def images():
    return torch.rand(3, 3, 64, 64) * 2 - 1


def prompt_ids(folder, kind, prompts=PROMPTS, **others):
    tokenizers = read_published(str(folder), **fields(kind, **others)).tokenizers
    return [
        tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
        for tokenizer in tokenizers
    ]


def stock_inputs(kind, tower, noisy, timestep, prompts) -> dict[str, Any]:
    """What the published pipeline gives the stock transformer."""
    inputs = {**prompts, "hidden_states": noisy, "timestep": torch.full((len(noisy),), float(timestep))}
    if kind == "flux":
        height, width = noisy.shape[-2:]
        inputs["hidden_states"] = FluxPipeline._pack_latents(noisy, len(noisy), 4, height, width)
        inputs["img_ids"] = FluxPipeline._prepare_latent_image_ids(1, height // 2, width // 2, "cpu", torch.float32)
        inputs["txt_ids"] = torch.zeros(prompts["encoder_hidden_states"].shape[1], 3)
        inputs["timestep"] = inputs["timestep"] / 1000
        inputs["guidance"] = torch.full((len(noisy),), 3.5)
    return inputs


def image_part(kind, name, output):
    """The image's tokens in what a module of the stock model returned; 16 of them."""
    block = int(name.split("-")[1][1:])
    if name.endswith("-Out") and "Joint" not in name and "Self" not in name:
        return output[1]  # a block returns text, then image
    output = output[0] if isinstance(output, tuple) else output
    return output[:, -16:] if kind == "flux" and block >= 2 else output  # one sequence, the image last


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_tap_equals_a_hook_on_the_whole_stock_model(folders, towers, kind):
    tower, noisy = towers[kind], torch.randn(3, 4, 8, 8)
    taps = tower.config.all_taps()
    prompts = tower.encode_prompts(*prompt_ids(folders[kind], kind))
    model, order, outputs = tower.backbone.transformer, [], {}
    for tap in taps:
        model.get_submodule(tap.module_path).register_forward_hook(
            lambda m, args, output, name=tap.name: (order.append(name), outputs.update({name: output}))[2:] or None
        )
    try:
        model(**stock_inputs(kind, tower, noisy, 260, prompts))
    finally:
        for module in model.modules():
            module._forward_hooks.clear()
    assert order == [tap.name for tap in taps]  # in the order of the forward pass
    read = tower.backbone.read(noisy, 260, prompts, taps)
    for tap, features in zip(taps, read, strict=True):
        assert features.shape == (3, tap.height * tap.width, tap.channels) == (3, 16, 32)
        assert torch.equal(features, image_part(kind, tap.name, outputs[tap.name])), tap
        single = tower.backbone.read(noisy, 260, prompts, [tap])[0]
        assert torch.equal(single, features)


def test_taps_are_named_by_their_block():
    names = [tap.name for tap in StableDiffusion3().list_taps({"transformer_config": tiny_families.SD3}, 8)]
    block = ["Norm", "Joint-Q", "Joint-Out", "Self-Q", "Self-Out", "Out"]
    assert names == [f"T-B{b}-{feature}" for b in range(3) for feature in block if b < 2 or "Self" not in feature]
    taps = {tap.name: tap for tap in Flux().list_taps({"transformer_config": tiny_families.FLUX}, 8)}
    assert taps["T-B1-Norm"].module_path == "transformer_blocks.1.norm1"
    assert taps["T-B3-Norm"].module_path == "single_transformer_blocks.1.norm"
    assert taps["T-B3-Joint-Q"].module_path == "single_transformer_blocks.1.attn.to_q"


@torch.no_grad()
def test_prompts_equal_the_pipeline_of_stable_diffusion_3(folders, towers):
    folder, backbone = folders["sd3"], towers["sd3"].backbone
    pipeline = StableDiffusion3Pipeline(
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
        tokenizer_3=AutoTokenizer.from_pretrained(folder / "tokenizer_3"),
        text_encoder=backbone.text_encoder, text_encoder_2=backbone.text_encoder_2,
        text_encoder_3=backbone.text_encoder_3, transformer=backbone.transformer, vae=backbone.vae,
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
    )  # fmt: skip
    expected, null, pooled, null_pooled = pipeline.encode_prompt(PROMPTS, None, None, device="cpu")
    found, empty = towers["sd3"].encode_prompts(*prompt_ids(folder, "sd3")), towers["sd3"].null_prompt()
    assert found["encoder_hidden_states"].shape == (3, 77 + 256, 64)
    assert torch.equal(found["encoder_hidden_states"], expected)
    assert torch.equal(found["pooled_projections"], pooled)
    torch.testing.assert_close(empty["encoder_hidden_states"], null[:1], rtol=0, atol=1e-6)
    torch.testing.assert_close(empty["pooled_projections"], null_pooled[:1], rtol=0, atol=1e-6)
    pipeline.text_encoder_3 = None
    without = pipeline.encode_prompt(PROMPTS, None, None, device="cpu")[0]
    tower = SDLlavaDiffusionModel.from_component_pretrained(str(folder), **fields("sd3", use_t5=False))
    found = tower.encode_prompts(*prompt_ids(folder, "sd3", use_t5=False))["encoder_hidden_states"]
    assert not hasattr(tower.backbone, "text_encoder_3")
    assert torch.equal(found, without)


@torch.no_grad()
def test_prompts_equal_the_pipeline_of_flux(folders, towers):
    folder, backbone = folders["flux"], towers["flux"].backbone
    pipeline = FluxPipeline(
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        tokenizer_2=AutoTokenizer.from_pretrained(folder / "tokenizer_2"),
        text_encoder=backbone.text_encoder, text_encoder_2=backbone.text_encoder_2,
        transformer=backbone.transformer, vae=backbone.vae,
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
    )  # fmt: skip
    expected, pooled, text_ids = pipeline.encode_prompt(PROMPTS, None, device="cpu")
    found, empty = towers["flux"].encode_prompts(*prompt_ids(folder, "flux")), towers["flux"].null_prompt()
    assert found["encoder_hidden_states"].shape == (3, 512, 32)
    assert not text_ids.any()
    for name, rows in {"encoder_hidden_states": expected, "pooled_projections": pooled}.items():
        assert torch.equal(found[name], rows)
        torch.testing.assert_close(empty[name], rows[2:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_equals_the_flow_of_the_scheduler(towers, kind):
    latents, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    scheduler = FlowMatchEulerDiscreteScheduler()
    for timestep in (1, 50, 260, 999):
        expected = scheduler.scale_noise(latents, torch.tensor([float(timestep)]), noise)
        torch.testing.assert_close(towers[kind].add_noise(latents, timestep, noise), expected, rtol=0, atol=1e-6)
    assert torch.equal(towers[kind].add_noise(latents, 0, noise), latents)
    assert torch.equal(towers[kind].backbone.prediction_target(latents, noise, 50), noise - latents)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_latents_are_shifted_and_scaled(towers, images, kind):
    vae = towers[kind].vae
    expected = (vae.encode(images).latent_dist.mode() - 0.0609) * 1.5305
    torch.testing.assert_close(towers[kind].encode_latents(images), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_prediction_is_that_of_the_stock_model(folders, towers, kind):
    tower, noisy = towers[kind], torch.randn(3, 4, 8, 8)
    prompts = tower.encode_prompts(*prompt_ids(folders[kind], kind))
    expected = tower.backbone.transformer(**stock_inputs(kind, tower, noisy, 260, prompts)).sample
    if kind == "flux":
        expected = FluxPipeline._unpack_latents(expected, 64, 64, vae_scale_factor=8)
    assert torch.equal(tower.backbone.predict(noisy, 260, prompts), expected)


@torch.no_grad()
def test_distilled_guidance_and_schnell(folders, towers, tmp_path):
    noisy = torch.randn(3, 4, 8, 8)
    ids = prompt_ids(folders["flux"], "flux")
    tower = SDLlavaDiffusionModel.from_component_pretrained(
        str(folders["flux"]), **fields("flux", distilled_guidance=1.0)
    )
    prompts, (tap,) = tower.encode_prompts(*ids), tower.taps
    given = tower.backbone.read(noisy, 260, prompts, [tap])[0]
    assert not torch.allclose(given, towers["flux"].backbone.read(noisy, 260, prompts, [tap])[0], atol=1e-4)
    schnell = tiny_families.save_flux(tmp_path, guidance_embeds=False)
    tower = SDLlavaDiffusionModel.from_component_pretrained(str(schnell), **fields("flux"))
    inputs = stock_inputs("flux", tower, noisy, 260, prompts)
    expected = []
    handle = tower.backbone.transformer.get_submodule(tap.module_path).register_forward_hook(
        lambda m, args, output: expected.append(output[:, -16:])
    )
    tower.backbone.transformer(**{**inputs, "guidance": None})
    handle.remove()
    assert torch.equal(tower.backbone.read(noisy, 260, prompts, [tap])[0], expected[0])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_question_gives_the_same_features_in_any_batch(folders, towers, images, kind):
    tower, ids = towers[kind], prompt_ids(folders[kind], kind)
    together = tower(images, *ids).last_hidden_state
    assert together.shape == (3, 16, 32)
    order = [2, 0, 1]
    moved = tower(images[order], *(row[order] for row in ids)).last_hidden_state
    torch.testing.assert_close(moved, together[order], rtol=0, atol=1e-5)
    alone = tower(images[1:2], *(row[1:2] for row in ids)).last_hidden_state
    torch.testing.assert_close(alone[0], together[1], rtol=0, atol=1e-5)
    other = tower(images[1:2], *(row[:1] for row in ids)).last_hidden_state
    assert not torch.allclose(other[0], together[1], atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_what_comes_after_the_tap_is_neither_in_memory_nor_in_the_file(folders, towers, images, tmp_path, kind):
    tower = SDLlavaDiffusionModel.from_component_pretrained(str(folders[kind]), truncate=True, **fields(kind))
    ids = prompt_ids(folders[kind], kind)
    expected = towers[kind](images, *ids).last_hidden_state
    assert torch.equal(tower(images, *ids).last_hidden_state, expected)
    model = tower.backbone.transformer
    block = model.transformer_blocks[1] if kind == "sd3" else model.single_transformer_blocks[0]
    assert isinstance(model.proj_out, CutAway)
    assert isinstance(block.attn.to_v, CutAway)
    assert isinstance(block.attn.to_k, torch.nn.Linear)  # for attention maps
    tower.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    later = ("transformer_blocks.2.", "attn2.to_k") if kind == "sd3" else ("single_transformer_blocks.1.", "attn.to_v")
    last = f"{later[0].split('.')[0]}.{1 if kind == 'sd3' else 0}.{later[1]}"
    assert not [name for name in names if f"transformer.{later[0]}" in name or last in name or "decoder" in name]
    loaded, info = SDLlavaDiffusionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(loaded(images, *ids).last_hidden_state, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [0, 1, 2])
@torch.no_grad()
def test_attention_maps_are_the_text_part_of_the_joint_attention(folders, towers, images, kind, layer):
    tower, ids = towers[kind], prompt_ids(folders[kind], kind)
    is_single = kind == "flux" and layer == 2
    model = tower.backbone.transformer
    attention = (model.single_transformer_blocks[0] if is_single else model.transformer_blocks[layer]).attn
    prompts = tower.encode_prompts(*ids)
    num_text = prompts["encoder_hidden_states"].shape[1]
    known = {tap.name: tap for tap in tower.config.all_taps()}
    reader = SDLlavaDiffusionModel.from_component_pretrained(
        str(folders[kind]), **fields(kind, taps=[f"T-B{layer}-Out"], guidance_scales=[1])
    )
    with reader.capture_attention(layers=[f"T-B{layer}"], per_head=True) as maps:
        reader(images, *ids)
    found = maps[f"T-B{layer}", 50].flatten(3).transpose(2, 3)  # (n, heads, positions, tokens)
    assert found.shape == (3, 2, 16, num_text)
    # values that mark each text token in turn: the stock attention's output is then the text's probabilities
    noisy = tower.add_noise(tower.encode_latents(images), 50, tower.noise(torch.zeros(3, 4, 8, 8)))
    value, before = (attention.to_v if is_single else attention.add_v_proj), {}
    for token in (1, num_text - 1):
        marked = torch.zeros(3, num_text + (16 if is_single else 0), 32)
        marked[:, token] = 1
        handles = [value.register_forward_hook(lambda m, a, o, marked=marked: marked)]
        if not is_single:
            handles.append(attention.to_v.register_forward_hook(lambda m, a, o: torch.zeros_like(o)))
            handles.append(attention.to_out[0].register_forward_pre_hook(lambda m, args: before.update(image=args[0])))
        tap = known[f"T-B{layer}-Joint-Out"]
        output = tower.backbone.read(noisy, 50, prompts, [tap])[0]
        for handle in handles:
            handle.remove()
        image = output if is_single else before["image"]
        torch.testing.assert_close(image.unflatten(2, (2, 16))[..., 0].transpose(1, 2), found[..., token])
    assert tower.attention_layers() == [f"T-B{b}" for b in range(int(TAPS[kind][3]) + 1)]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_concept_maps_are_products_of_the_outputs_of_the_attention(folders, images, kind):
    """Before its projections, of the given prompt's half; only blocks with an output for the text have them."""
    tower = SDLlavaDiffusionModel.from_component_pretrained(str(folders[kind]), **fields(kind, taps=["T-B2-Out"]))
    attention, outputs = tower.backbone.transformer.transformer_blocks[1].attn, []
    attention.to_out[0], attention.to_add_out = torch.nn.Identity(), torch.nn.Identity()
    attention.register_forward_hook(lambda module, args, output: outputs.append([part[-3:] for part in output]))
    ids = prompt_ids(folders[kind], kind)
    with tower.capture_attention(concepts=True) as maps:
        tower(images, *ids)  # at s = 4, so with the empty prompt's half
    ((image, text),) = outputs
    assert maps.layers == ["T-B0", "T-B1"]
    assert maps.of_outputs
    products = torch.einsum("npc,ntc->ntp", image, text)
    torch.testing.assert_close(maps["T-B1", 50].flatten(3)[:, 0], products)
    query_only = SDLlavaDiffusionModel.from_component_pretrained(
        str(folders[kind]), **fields(kind, taps=["T-B0-Joint-Q"])
    )
    with pytest.raises(ValueError, match=r"No joint attention .* last tap, 'T-B0-Joint-Q', .* Use attention maps"):
        query_only.capture_attention(concepts=True).__enter__()


@pytest.mark.parametrize(
    ("family", "model", "config", "parameters", "sizes"),
    [
        (
            StableDiffusion3, SD3Transformer2DModel,
            {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192},
            2_028_328_000, (32, 1536),
        ),
        (
            StableDiffusion3, SD3Transformer2DModel,
            {
                "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 384,
                "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm",
            },
            2_243_171_520, (32, 1536),
        ),
        (
            StableDiffusion3, SD3Transformer2DModel,
            {
                "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192,
                "qk_norm": "rms_norm",
            },
            8_056_627_520, (32, 2432),
        ),
        (Flux, FluxTransformer2DModel, {"guidance_embeds": True}, 11_901_408_320, (32, 3072)),
        (Flux, FluxTransformer2DModel, {"guidance_embeds": False}, 11_891_178_560, (32, 3072)),
    ],
)  # fmt: skip
def test_the_published_sizes_have_their_parameters_before_the_cut(family, model, config, parameters, sizes):
    with torch.device("meta"):
        transformer = model(**config)
    assert sum(p.numel() for p in transformer.parameters()) == parameters
    taps = family().list_taps({"transformer_config": transformer.config}, 64)
    assert {(tap.height, tap.channels) for tap in taps} == {sizes}
    assert family.default_tap in [tap.name for tap in taps]


@pytest.mark.parametrize("kind", KINDS)
def test_a_published_configuration_survives_saving(folders, tmp_path, kind):
    config = read_published(str(folders[kind]), **fields(kind)).config
    assert config.family.name == {"sd3": "stable_diffusion_3", "flux": "flux"}[kind]
    assert (config.latent_size, config.prompt_width) == (8, 64 if kind == "sd3" else 32)
    config.save_pretrained(tmp_path)
    again = SDLlavaDiffusionConfig.from_pretrained(tmp_path)
    assert again.null_prompt_ids == config.null_prompt_ids
    assert [tap.name for tap in again.resolved_taps()] == [TAPS[kind]]
    assert read_whole(str(folders[kind])).config.taps == [f"T-B{2 if kind == 'sd3' else 3}-Joint-Q"]


@pytest.mark.parametrize(
    ("kind", "others", "message"),
    [
        ("sd3", {"taps": ["T-B1-Cross-Q"]}, r"no tap 'T-B1-Cross-Q' in this denoiser\. The nearest are .*T-B1"),
        ("flux", {"taps": ["U-L1-R1-B0-Cross-Q"]}, r"no tap 'U-L1-R1-B0-Cross-Q' in this denoiser"),
        ("sd3", {"image_size": 112}, r"image_size=112 is larger than the 96 pixels that this model has positions for"),
        ("flux", {"image_size": 72}, r"image_size=72 is not a whole number of patches of 16 pixels"),
        ("flux", {"timesteps": [1000]}, r"Timestep 1000 is outside the training schedule\. Use a value in 0\.\.999"),
        ("flux", {"use_t5": False}, r"use_t5=False only fits Stable Diffusion 3, not the family 'flux'"),
    ],
)
def test_fields_that_do_not_fit_raise(folders, kind, others, message):
    with pytest.raises(ValueError, match=message):
        read_published(str(folders[kind]), **fields(kind, **others))


def test_a_repository_without_t5(tmp_path):
    folder = tiny_families.save_sd3(tmp_path / "sd3", use_t5=False)
    with pytest.raises(ValueError, match=r"this Stable Diffusion 3 has no T5 encoder\. Set use_t5=False"):
        read_published(str(folder), **fields("sd3"))
    assert len(read_published(str(folder), **fields("sd3", use_t5=False)).tokenizers) == 2
    assert not read_whole(str(folder)).config.use_t5


def test_parts_of_other_models_raise(tmp_path):
    folder = tiny_families.save_flux(tmp_path / "flux", joint_attention_dim=48)
    with pytest.raises(ValueError, match="conditioned on prompts of width 48, but the text encoders give 32"):
        read_published(str(folder), **fields("flux"))
    folder = tiny_families.save_sd3(tmp_path / "sd3", pooled_projection_dim=32)
    with pytest.raises(ValueError, match="conditioned on pooled prompts of width 32, but the text encoders give 64"):
        read_published(str(folder), **fields("sd3"))


@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_every_tokenizer_are_needed(folders, towers, images, kind):
    ids = prompt_ids(folders[kind], kind)
    with pytest.raises(ValueError, match="Give diffusion_input_ids_2"):
        towers[kind](images, ids[0])


@torch.no_grad()
def test_the_adaln_tap_of_a_joint_block_is_its_normalised_input(folders, towers):
    tower, noisy = towers["sd3"], torch.randn(3, 4, 8, 8)
    prompts, by_name = tower.encode_prompts(*prompt_ids(folders["sd3"], "sd3")), {}
    for tap in tower.config.all_taps():
        by_name[tap.name] = tap
    names = ["T-B1-Out", "T-B2-Norm"]
    before, norm = tower.backbone.read(noisy, 260, prompts, [by_name[name] for name in names])
    model = tower.backbone.transformer
    embedding = model.time_text_embed(torch.full((3,), 260.0), prompts["pooled_projections"])
    shift, scale = model.transformer_blocks[2].norm1.linear(F.silu(embedding)).chunk(6, dim=1)[:2]
    expected = F.layer_norm(before, (32,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    torch.testing.assert_close(norm, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("model_class", [SDLlavaDiffusionModel, SDLlavaForConditionalGeneration])
def test_four_bits_are_for_language_models_and_t5(folders, published, tmp_path, model_class):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is optional")
    parts = {"diffusion": str(folders["sd3"]), **fields("sd3")}
    if model_class is SDLlavaForConditionalGeneration:
        parts |= {"vision": str(published["clip"]), "language_model": str(published["llm"])}
        parts |= {"fusion_num_attention_heads": 4}
    model_class.from_component_pretrained(**parts).save_pretrained(tmp_path)
    options = BitsAndBytesConfig(load_in_4bit=True)
    model = model_class.from_pretrained(tmp_path, quantization_config=options).eval()
    quantised = [name for name, m in model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    encoder = [name for name in quantised if "diffusion_tower" in name or name.startswith("backbone")]
    assert encoder
    assert all(".text_encoder_3.encoder.block." in f".{name}" for name in encoder)
    assert {name.rpartition(".")[2] for name in encoder} == {"q", "k", "v", "o", "wi_0", "wi_1"}
    assert all("language_model." in name for name in set(quantised) - set(encoder))
    tower = model if model_class is SDLlavaDiffusionModel else model.model.diffusion_tower
    ids = prompt_ids(folders["sd3"], "sd3")
    features = tower(torch.zeros(3, 3, 64, 64), *ids).last_hidden_state
    assert features.isfinite().all()


@pytest.mark.parametrize(
    ("kind", "published"),
    [("sd3", {"dual_attention_layers": (), "qk_norm": None}), ("flux", {"guidance_embeds": False})],
    ids=["sd3-medium", "schnell"],
)
@torch.no_grad()
def test_every_tap_of_the_other_published_models_equals_a_hook(tmp_path, kind, published):
    """Stable Diffusion 3 medium has no norm of queries and no second attention, FLUX.1-schnell no guidance."""
    folder = getattr(tiny_families, f"save_{kind}")(tmp_path, **published)
    tower = SDLlavaDiffusionModel.from_component_pretrained(str(folder), **fields(kind))
    prompts, noisy = tower.encode_prompts(*prompt_ids(folder, kind)), torch.randn(3, 4, 8, 8)
    inputs, outputs = stock_inputs(kind, tower, noisy, 260, prompts), {}
    handles = []
    for tap in tower.config.all_taps():
        module = tower.backbone.transformer.get_submodule(tap.module_path)
        keep = lambda m, args, output, name=tap.name: outputs.update({name: output})  # noqa: E731
        handles.append(module.register_forward_hook(keep))
    tower.backbone.transformer(**{**inputs, **({"guidance": None} if kind == "flux" else {})})
    for handle in handles:
        handle.remove()
    taps = tower.config.all_taps()
    for tap, features in zip(taps, tower.backbone.read(noisy, 260, prompts, taps), strict=True):
        assert torch.equal(features, image_part(kind, tap.name, outputs[tap.name])), tap
