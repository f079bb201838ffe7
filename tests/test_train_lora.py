"""LoRA sits where it was asked for, projector and fusion travel with it, and merged equals unmerged."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from train_fixtures import command, write_colours, write_parts

from sdllava.data.sources import DataSource, load_data
from sdllava.modeling_sdllava import SDLlavaForConditionalGeneration
from sdllava.processors import SDLlavaProcessor
from sdllava.train.adapters import merge
from sdllava.train.arguments import AdapterArguments, ModelArguments
from sdllava.train.build import build_model
from sdllava.train.collator import SDLlavaCollator
from sdllava.train.run import train
from sdllava.train.stages import count_parameters

SHORT = {"max_steps": 2, "save_steps": 2, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("work")
    write_parts(root)
    write_colours(root / "data")
    train(command(root, "base", **SHORT))
    train(command(root, "lora", init_from=root / "base", lora_r=4, unet_lora_r=2, **SHORT))
    train(command(root, "unet", init_from=root / "base", unet_lora_r=2, **SHORT))
    return root


def logits(model, work: Path) -> torch.Tensor:
    rows = load_data([DataSource(str(work / "data" / "colours.json"))])
    batch = SDLlavaCollator(SDLlavaProcessor.from_pretrained(work / "base")).for_evaluation()(
        [rows[i] for i in range(3)]
    )
    with torch.no_grad():
        return model.eval()(**{name: x for name, x in batch.items() if name != "labels"}).logits


def unmerged(work: Path) -> PeftModel:
    base = SDLlavaForConditionalGeneration.from_pretrained(work / "base")
    return PeftModel.from_pretrained(base, work / "lora")


def test_an_adapter_sits_where_asked_and_brings_projector_and_fusion(work):
    config = json.loads((work / "lora" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["multi_modal_projector", "fusion"]
    assert config["base_model_name_or_path"] == str(work / "base")
    model = unmerged(work)
    adapted = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A." in name}
    language = {name for name in adapted if ".language_model." in name}
    unet = {name for name in adapted if ".unet." in name}
    assert adapted == language | unet
    assert len(language) == 2 * 7
    assert all(".attn2." in name for name in unet)
    ranks = {name: p.shape[0] for name, p in model.named_parameters() if ".lora_A." in name}
    assert {rank for name, rank in ranks.items() if ".unet." in name} == {2}
    assert {rank for name, rank in ranks.items() if ".unet." not in name} == {4}
    assert not (work / "lora" / "model.safetensors").exists()


def test_merged_equals_unmerged(work):
    merge(str(work / "lora"), str(work / "merged"))
    merged = SDLlavaForConditionalGeneration.from_pretrained(work / "merged")
    with_adapter = logits(unmerged(work), work)
    torch.testing.assert_close(logits(merged, work), with_adapter, atol=1e-5, rtol=1e-5)
    plain = logits(SDLlavaForConditionalGeneration.from_pretrained(work / "base"), work)
    assert (with_adapter - plain).abs().max() > 1e-3
    assert SDLlavaProcessor.from_pretrained(work / "merged").num_image_tokens == 16
    with pytest.raises(FileExistsError, match="exists already"):
        merge(str(work / "lora"), str(work / "merged"))
    with pytest.raises(ValueError, match="holds no adapter"):
        merge(str(work / "base"), str(work / "merged2"))


def test_from_pretrained_takes_an_adapter(work):
    model = SDLlavaForConditionalGeneration.from_pretrained(work / "lora")
    torch.testing.assert_close(logits(model, work), logits(unmerged(work), work), atol=1e-5, rtol=1e-5)


def test_qlora_holds_the_language_model_alone_in_4_bits(work):
    pytest.importorskip("bitsandbytes")
    arguments = ModelArguments(init_from=str(work / "base"), dtype="bfloat16")
    model = build_model(arguments, AdapterArguments(lora_r=4, load_in_4bit=True))
    packed = {name for name, p in model.named_parameters() if p.dtype == torch.uint8}
    assert len(packed) == 2 * 7
    assert all(".language_model.layers." in name for name in packed)
    counts = {count.name: count.trained + count.frozen for count in count_parameters(model)}
    unpacked = SDLlavaForConditionalGeneration.from_pretrained(work / "base")
    expected = [*unpacked.model.language_model.parameters(), *unpacked.lm_head.parameters()]
    assert counts["language model"] == sum(p.numel() for p in expected)
    flags = {"lora_r": 4, "load_in_4bit": "true", "bf16": "true", "dtype": "bfloat16", "max_steps": 2, "save_steps": 2}
    train(command(work, "qlora", init_from=work / "base", **flags))
    merge(str(work / "qlora"), str(work / "qlora-merged"))


def test_lora_in_the_unet_alone_ends_in_a_plain_model(work):
    final = SDLlavaForConditionalGeneration.from_pretrained(work / "unet")
    assert not any("lora" in name for name, _ in final.named_parameters())
    merge(str(work / "unet" / "checkpoint-2"), str(work / "unet-merged"))
    merged = SDLlavaForConditionalGeneration.from_pretrained(work / "unet-merged")
    assert torch.equal(logits(final, work), logits(merged, work))
    base = SDLlavaForConditionalGeneration.from_pretrained(work / "base").state_dict()
    changed = {name for name, tensor in final.state_dict().items() if not torch.equal(tensor, base[name])}
    in_unet = {name for name in changed if ".unet." in name}
    assert in_unet
    assert all(".attn2." in name for name in in_unet)
    assert not any(".vae." in name or ".text_encoder." in name or "vision_tower" in name for name in changed)


def test_training_goes_on_from_an_adapter(work):
    train(command(work, "second", init_from=work / "lora", **SHORT))
    assert (work / "second" / "model.safetensors").is_file()
    with pytest.raises(ValueError, match=r"is an adapter, and the run sets \['guidance_scales'\]: merge it first"):
        train(command(work, "third", init_from=work / "lora", guidance_scales=1, **SHORT))


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"stage": "align"}, "stage 'align' keeps frozen"),
        ({"guidance_scales": 1}, "change no field of its configuration"),
        ({"grid_size": 8}, "change no field"),
        ({"lora_r": 0, "load_in_4bit": "true"}, "cannot train themselves: set lora_r"),
    ],
)
def test_adapters_that_could_not_be_used_are_refused(work, flags, reason):
    with pytest.raises(ValueError, match=reason):
        train(command(work, "refused", **{"init_from": work / "base", "lora_r": 4, **SHORT, **flags}))


def test_lora_on_a_llava_is_refused(published, work):
    with pytest.raises(ValueError, match=r"which belongs to a checkpoint of ours: make one of .*llava first"):
        train(command(work, "refused", init_from=published["llava"], lora_r=4, max_length=1024, **SHORT))


@pytest.mark.parametrize(
    ("flags", "error", "reason"),
    [
        ({"init_from": "nowhere"}, FileNotFoundError, "no checkpoint nowhere"),
        ({"taps": "U-L2-R1-B0-Cross-Q"}, ValueError, r"lacks \d+ frozen weights that this configuration needs"),
        ({"fusion": "concat"}, ValueError, "has a projector for 32 channels"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(work, flags, error, reason):
    with pytest.raises(error, match=reason):
        train(command(work, "refused", **{"init_from": work / "base", **SHORT, **flags}))
