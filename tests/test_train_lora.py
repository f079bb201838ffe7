"""LoRA is where the run puts it, projector and fusion are saved with it, and merged equals unmerged."""

import json

import pytest
import torch
from peft import PeftModel
from train_fixtures import command

from sdllava.data.sources import DataSource, load_data
from sdllava.modeling_sdllava import SDLlavaForConditionalGeneration
from sdllava.processors import SDLlavaProcessor
from sdllava.train.adapters import language_lora, load_merged, merge
from sdllava.train.arguments import AdapterArguments, ModelArguments
from sdllava.train.build import build_model, build_processor, read_source
from sdllava.train.collator import SDLlavaCollator
from sdllava.train.memory import count_parameters
from sdllava.train.run import build_collator, build_trainer, load_sources, parse_run, train

SHORT = {"max_steps": 2, "save_steps": 2, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def lora(work) -> str:
    """An adapter of both models."""
    train(command(work, "lora", init_from=work / "trained", lora_r=4, unet_lora_r=2, **SHORT))
    return str(work / "lora")


@pytest.fixture(scope="module")
def base(work) -> SDLlavaForConditionalGeneration:
    return SDLlavaForConditionalGeneration.from_pretrained(work / "trained").eval()


@pytest.fixture(scope="module")
def unmerged(work, lora) -> PeftModel:
    model = SDLlavaForConditionalGeneration.from_pretrained(work / "trained")
    return PeftModel.from_pretrained(model, lora).eval()


@pytest.fixture(scope="module")
def batch(work) -> dict:
    rows = load_data([DataSource(str(work / "data" / "colours.json"))])
    collator = SDLlavaCollator(SDLlavaProcessor.from_pretrained(work / "trained")).for_evaluation()
    return {name: x for name, x in collator([rows[i] for i in range(3)]).items() if name != "labels"}


def logits(model, batch: dict) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch).logits


def test_an_adapter_holds_projector_and_fusion(work, lora, unmerged):
    config = json.loads((work / "lora" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["multi_modal_projector", "fusion"]
    assert config["base_model_name_or_path"] == str(work / "trained")
    adapted = {name.split(".lora_A")[0] for name, _ in unmerged.named_parameters() if ".lora_A." in name}
    language = {name for name in adapted if ".language_model." in name}
    unet = {name for name in adapted if ".unet." in name}
    assert adapted == language | unet
    assert len(language) == 2 * 7
    assert all(".attn2." in name for name in unet)
    ranks = {name: p.shape[0] for name, p in unmerged.named_parameters() if ".lora_A." in name}
    assert {rank for name, rank in ranks.items() if ".unet." in name} == {2}
    assert {rank for name, rank in ranks.items() if ".unet." not in name} == {4}
    assert not (work / "lora" / "model.safetensors").exists()


def test_the_frozen_base_keeps_its_dtype(work):
    flags = {"init_from": work / "trained", "lora_r": 2, "dtype": "bfloat16", "bf16": "true"}
    run = parse_run(command(work, "dtypes", **flags))
    source = read_source(run.model, run.adapter)
    data = load_sources(run, run.data.datasets)
    trainer = build_trainer(run, source, build_collator(run, build_processor(source)), data)
    found = {(p.requires_grad, p.dtype) for name, p in trainer.model.named_parameters() if ".vae." not in name}
    assert found == {(True, torch.float32), (False, torch.bfloat16)}


def test_merged_equals_unmerged(work, lora, base, unmerged, batch):
    merge(lora, str(work / "merged"))
    merged = SDLlavaForConditionalGeneration.from_pretrained(work / "merged")
    with_adapter = logits(unmerged, batch)
    torch.testing.assert_close(logits(merged, batch), with_adapter, atol=1e-5, rtol=1e-5)
    assert (with_adapter - logits(base, batch)).abs().max() > 1e-3
    assert SDLlavaProcessor.from_pretrained(work / "merged").num_image_tokens == 16
    with pytest.raises(FileExistsError, match=r"merged' exists\. Give a new folder"):
        merge(lora, str(work / "merged"))
    with pytest.raises(ValueError, match="holds no adapter"):
        merge(str(work / "trained"), str(work / "merged2"))


def test_from_pretrained_takes_an_adapter(lora, unmerged, batch):
    model = SDLlavaForConditionalGeneration.from_pretrained(lora)
    torch.testing.assert_close(logits(model, batch), logits(unmerged, batch), atol=1e-5, rtol=1e-5)


def test_qlora_holds_only_the_language_model_in_4_bits(work, base):
    pytest.importorskip("bitsandbytes")
    arguments = ModelArguments(init_from=str(work / "trained"), dtype="bfloat16")
    model = build_model(read_source(arguments, AdapterArguments(lora_r=4, load_in_4bit=True)))
    packed = {name for name, p in model.named_parameters() if p.dtype == torch.uint8}
    assert len(packed) == 2 * 7
    assert all(".language_model.layers." in name for name in packed)
    counts = {count.name: count.trained + count.frozen for count in count_parameters(model)}
    expected = [*base.model.language_model.parameters(), *base.lm_head.parameters()]
    assert counts["language model"] == sum(p.numel() for p in expected)


@pytest.mark.slow
def test_qlora_trains_and_merges(work):
    pytest.importorskip("bitsandbytes")
    flags = {"lora_r": 4, "load_in_4bit": "true", "bf16": "true", "dtype": "bfloat16", "max_steps": 2, "save_steps": 2}
    train(command(work, "qlora", init_from=work / "trained", **flags))
    merge(str(work / "qlora"), str(work / "qlora-merged"))
    assert (work / "qlora-merged" / "model.safetensors").is_file()


@pytest.mark.slow
def test_lora_only_in_the_unet_ends_in_a_plain_model(work, base, batch):
    train(command(work, "unet", init_from=work / "trained", unet_lora_r=2, **SHORT))
    final = SDLlavaForConditionalGeneration.from_pretrained(work / "unet")
    assert not any("lora" in name for name, _ in final.named_parameters())
    merged = load_merged(str(work / "unet" / "checkpoint-2"))
    assert torch.equal(logits(final, batch), logits(merged, batch))
    before = base.state_dict()
    changed = {name for name, tensor in final.state_dict().items() if not torch.equal(tensor, before[name])}
    in_unet = {name for name in changed if ".unet." in name}
    assert in_unet
    assert all(".attn2." in name for name in in_unet)
    assert not any(".vae." in name or ".text_encoder." in name or "vision_tower" in name for name in changed)


def test_an_adapter_is_a_starting_point(lora, unmerged, batch):
    model = build_model(read_source(ModelArguments(init_from=lora)))
    torch.testing.assert_close(logits(model, batch), logits(unmerged, batch), atol=1e-5, rtol=1e-5)
    assert all(p.requires_grad for p in model.model.language_model.parameters())
    with pytest.raises(ValueError, match=r"is an adapter, but the run sets \['guidance_scales'\]\. Merge it"):
        build_model(read_source(ModelArguments(init_from=lora, guidance_scales=[1.0])))


@pytest.mark.slow
def test_training_continues_from_an_adapter(work, lora):
    train(command(work, "second", init_from=lora, **SHORT))
    assert (work / "second" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"stage": "align"}, "stage 'align' keeps frozen"),
        ({"guidance_scales": [1.0]}, r"set no field of its configuration \(\['guidance_scales'\]\)"),
        ({"grid_size": 8}, "set no field"),
        ({"init_from": None, "language_model": "lm"}, r"Give one in init_from \(not None\)"),
    ],
)
def test_adapters_that_could_not_be_used_raise(work, fields, reason):
    with pytest.raises(ValueError, match=reason):
        read_source(ModelArguments(**{"init_from": str(work / "trained"), **fields}), AdapterArguments(lora_r=4))


def test_projector_and_fusion_can_stay_as_they_are(base):
    assert language_lora(base, AdapterArguments(lora_r=4, train_projector=False)).modules_to_save == []


def test_training_checks_its_adapter(work):
    with pytest.raises(ValueError, match=r"cannot be trained\. Set lora_r"):
        train(command(work, "unfit", init_from=work / "trained", load_in_4bit="true", **SHORT))


@pytest.mark.parametrize(
    ("adapters", "reason"),
    [
        ({"lora_r": 4}, r"Convert '.*llava' with sdllava compose"),
        ({"lora_r": 4, "load_in_4bit": True}, r"Convert '.*llava' with sdllava compose"),
    ],
)
def test_lora_on_a_llava_raises(published, adapters, reason):
    with pytest.raises(ValueError, match=reason):
        build_model(read_source(ModelArguments(init_from=str(published["llava"])), AdapterArguments(**adapters)))


@pytest.mark.parametrize(
    ("fields", "error", "reason"),
    [
        ({"init_from": "nowhere"}, FileNotFoundError, "Checkpoint 'nowhere' .* does not exist"),
        ({"taps": ["U-L1-R1-B0-Out"]}, ValueError, r"[Ll]acks \d+ frozen weights"),
        ({"fusion": "concat"}, ValueError, "has a projector for 32 channels"),
        ({"timesteps": [-1]}, ValueError, r"Timestep -1 is outside the training schedule\. Use a value in 0\.\.999"),
        ({"guidance_scales": [float("nan")]}, ValueError, "must be finite numbers"),
        ({"spatial_merge_size": 3}, ValueError, "spatial_merge_size=3"),
        ({"spatial_merge_size": 2}, ValueError, "has a projector for 32 channels, but the run's settings give 128"),
    ],
)
def test_checkpoints_that_do_not_fit_raise(work, fields, error, reason):
    with pytest.raises(error, match=reason):
        build_model(read_source(ModelArguments(**{"init_from": str(work / "trained"), **fields})))
