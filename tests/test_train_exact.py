"""Runs that should be equal are, frozen parts stay, and gradients through the frozen UNet are right."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from train_fixtures import command, losses, model_arguments, weights, write_colours

from sdllava.data.sources import DataSource, load_data
from sdllava.modeling_sdllava import SDLlavaForConditionalGeneration
from sdllava.train.__main__ import main
from sdllava.train.adapters import inject_unet_lora
from sdllava.train.arguments import AdapterArguments, ModelArguments
from sdllava.train.build import build_model, build_processor, read_source
from sdllava.train.collator import SDLlavaCollator
from sdllava.train.memory import count_parameters, estimate_memory
from sdllava.train.run import build_collator, build_trainer, load_sources, parse_run, train

SGD = {"optim": "sgd", "learning_rate": 0.5}
"""Adam turns rounding into whole steps where a gradient is nearly zero, so equal weights need a plainer optimizer."""
BASE = {"train_sampling_strategy": "sequential", "prompt_dropout": 0.3, **SGD}
UNET = "model.diffusion_tower.backbone.unet."


@pytest.fixture(scope="module")
def data(work) -> Path:
    """Eight samples: two batches of four are an epoch."""
    return write_colours(work / "eight", n=8)


@pytest.fixture(scope="module")
def base(work, data) -> Path:
    """A run of two epochs in the order of the data, which others should equal."""
    train(command(work, "base", init_from=work / "trained", train_data=data, **BASE))
    return work / "base"


def assert_same_run(folder: Path, base: Path) -> None:
    assert losses(folder) == pytest.approx(losses(base), abs=1e-5)
    expected = weights(base)
    for name, tensor in weights(folder).items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=0, msg=name)


def batch_for(arguments: ModelArguments, data: Path, n: int = 2) -> dict:
    rows = load_data([DataSource(str(data))])
    return SDLlavaCollator(build_processor(read_source(arguments)), seed=0)([rows[i] for i in range(n)])


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("accumulated", {"global_batch_size": 4, "per_device_train_batch_size": 2}),
        ("streamed", {"streaming": "true"}),
        pytest.param(
            "by-hand",
            {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
            marks=pytest.mark.slow,
        ),
        pytest.param("recomputed", {"gradient_checkpointing": "true"}, marks=pytest.mark.slow),
    ],
)
def test_the_run_is_equal_whatever_its_form(work, data, base, name, flags):
    train(command(work, name, init_from=work / "trained", train_data=data, **BASE, **flags))
    assert_same_run(work / name, base)


@pytest.mark.slow
def test_two_processes_equal_one(work, data, base):
    arguments = command(
        work, "gloo", init_from=work / "trained", train_data=data, per_device_train_batch_size=2, **BASE
    )
    run_ranks(partial(main, arguments), work)
    assert_same_run(work / "gloo", base)


def test_checkpointed_gradients_equal_plain_ones(work, data):
    """Also where gradients pass through the UNet and its taps."""
    arguments = model_arguments(work, fusion="concat", fusion_num_attention_heads=None, guidance_scales=[1.0])
    model = build_model(read_source(arguments, AdapterArguments(unet_lora_r=2, lora_dropout=0.0))).train()
    batch = batch_for(arguments, data)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(**batch).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert any(".lora_B." in name for name in found[0])
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[1].items():
        torch.testing.assert_close(gradient, found[0][name], atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.slow
def test_half_precision_holds_what_trains_in_float32_and_saves_it_in_half(work):
    train(command(work, "half", init_from=work / "trained", bf16="true", dtype="bfloat16"))
    assert weights(work / "half")["lm_head.weight"].dtype == torch.bfloat16
    checkpoint = weights(work / "half" / "checkpoint-4")
    assert checkpoint["lm_head.weight"].dtype == torch.float32
    assert checkpoint["model.vision_tower.post_layernorm.weight"].dtype == torch.bfloat16
    assert losses(work / "half")[-1] < losses(work / "half")[0]


def test_batches_by_length_hold_samples_of_similar_length(work):
    samples = json.loads((work / "data" / "colours.json").read_text())[:8] * 8
    for i, sample in enumerate(samples):
        answer = sample["conversations"][1]["value"] + " red" * (i % 3 * 10)
        samples[i] = {**sample, "conversations": [sample["conversations"][0], {"from": "gpt", "value": answer}]}
    (work / "data" / "lengths.json").write_text(json.dumps(samples))
    flags = {"train_data": work / "data" / "lengths.json", "train_sampling_strategy": "group_by_length"}
    flags["init_from"] = work / "trained"
    run = parse_run(command(work, "by-length", **flags, per_device_train_batch_size=2))
    rows = load_sources(run, run.data.datasets)
    source = read_source(run.model)
    trainer = build_trainer(run, source, build_collator(run, build_processor(source)), rows)
    batches = list(trainer.get_train_dataloader().batch_sampler)[:8]
    kinds = [{len(rows[i]["messages"][-1]["content"].split()) // 10 for i in batch} for batch in batches]
    assert {len(batch) for batch in batches} == {2}
    # the sampler sorts 100 samples at a time, so three kinds meet in two batches at most
    assert sum(len(kind) > 1 for kind in kinds) <= 2
    assert len(set.union(*kinds)) > 1


def test_streams_need_max_steps(work):
    with pytest.raises(ValueError, match="Set max_steps"):
        train(command(work, "endless", streaming="true", max_steps=-1))


def test_global_batch_must_divide(work):
    with pytest.raises(ValueError, match="global_batch_size=6 is not a multiple of 4"):
        train(command(work, "odd", global_batch_size=6))


def assert_only_these_changed(folder: Path, work: Path, trained: tuple[str, ...]) -> None:
    before, after = weights(work / "trained"), weights(folder)
    frozen = [name for name in after if not name.startswith(trained)]
    assert len(frozen) > 100
    assert all(torch.equal(after[name], before[name]) for name in frozen)
    for part in trained:
        assert any(not torch.equal(after[name], before[name]) for name in after if name.startswith(part)), part


def test_finetune_leaves_the_encoders_bitwise_unchanged(work, base):
    trained = ("model.fusion.", "model.multi_modal_projector.", "model.language_model.", "lm_head.")
    assert_only_these_changed(base, work, trained)


@pytest.mark.slow
def test_align_leaves_all_but_projector_and_fusion_bitwise_unchanged(work):
    flags = {"stage": "align", "init_from": work / "trained", "diffusion_prompt": "none"}
    train(command(work, "align", max_steps=2, save_strategy="no", **flags))
    assert_only_these_changed(work / "align", work, ("model.fusion.", "model.multi_modal_projector."))


def test_frozen_parts_hold_no_gradient_and_are_counted(work, data):
    arguments = ModelArguments(init_from=str(work / "trained"), stage="align")
    model = build_model(read_source(arguments)).train()
    model(**batch_for(arguments, data)).loss.backward()
    for name, parameter in model.named_parameters():
        is_trained = name.startswith(("model.fusion.", "model.multi_modal_projector."))
        assert parameter.requires_grad == is_trained, name
        assert is_trained or parameter.grad is None, name
    assert all(not module.training for module in model.model.diffusion_tower.backbone.modules())
    counts = {count.name: count for count in count_parameters(model)}
    assert counts["language model"].trained == counts["diffusion model"].trained == 0
    projector = model.model.multi_modal_projector
    assert counts["projector"].trained == sum(p.numel() for p in projector.parameters())
    assert sum(c.trained + c.frozen for c in counts.values()) == sum(p.numel() for p in model.parameters())
    memory = estimate_memory(model, batch_size=2, length=10, checkpointing=False)
    assert memory.weights == sum(p.numel() * 4 for p in model.parameters())
    assert memory.optimizer == 2 * memory.gradients == 8 * sum(c.trained for c in counts.values())
    logits = 2 * memory_length(model) * 64 * 4
    assert memory.activations > 2 * logits  # the logits and their gradient
    assert memory.total == memory.weights + 3 * memory.gradients + memory.activations


def memory_length(model: SDLlavaForConditionalGeneration) -> int:
    """The tokens of a sequence in the memory estimate: at least the image's and one more."""
    return max(10, model.config.num_image_tokens + 1)


def finite_difference_check(model: SDLlavaForConditionalGeneration, parameter: torch.nn.Parameter, batch: dict) -> None:
    """The derivative of the image features along the gradient agrees with central differences.

    In float64, at the tap's own grid, because features are resized in float32.
    """
    names = ("pixel_values", "diffusion_pixel_values", "diffusion_input_ids", "diffusion_noise_seed")
    inputs = {name: batch[name] for name in names if name in batch}

    def value() -> torch.Tensor:
        return torch.stack(model.get_image_features(**inputs).pooler_output).square().sum()

    (gradient,) = torch.autograd.grad(value(), parameter)
    assert gradient.abs().max() > 0
    step = 1e-3 * gradient / gradient.norm()
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            parameter.add_(sign * step)
            values.append(value())
            parameter.sub_(sign * step)
    torch.testing.assert_close((values[0] - values[1]) / 2e-3, gradient.norm(), rtol=1e-3, atol=0)


def randomised(model: SDLlavaForConditionalGeneration) -> SDLlavaForConditionalGeneration:
    """In float64, with the fusion's zero projection filled, so that the diffusion features matter."""
    torch.manual_seed(1)
    if model.model.fusion is not None:
        torch.nn.init.normal_(model.model.fusion.out_proj.weight, std=0.2)
    return model.double()


def in_double(batch: dict) -> dict:
    return {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}


def test_lora_gradient_through_the_unet(work, data):
    arguments = model_arguments(work, grid_size=8, guidance_scales=[1.0])
    model = randomised(build_model(read_source(arguments, AdapterArguments(unet_lora_r=2, lora_dropout=0.0))))
    adapted, trained = set(), set()
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            adapted.add(name.split(".lora_A")[0])
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
        if parameter.requires_grad and ".diffusion_tower." in name:
            trained.add(name)
    batch = in_double(batch_for(arguments, data))
    tapped = "up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_q"
    early = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"
    for place in (f"{tapped}.lora_A", f"{early}.lora_B"):
        parameter = next(p for name, p in model.named_parameters() if place in name)
        finite_difference_check(model, parameter, batch)
    # LoRA is in every linear layer of the cross-attention up to the tap, and nowhere else
    layers = ("to_q", "to_k", "to_v", "to_out.0")
    blocks = ("down_blocks.0.attentions.0", "mid_block.attentions.0", "up_blocks.1.attentions.0")
    places = {f"{UNET}{block}.transformer_blocks.0.attn2.{layer}" for block in blocks for layer in layers}
    assert places <= adapted
    assert UNET + tapped in adapted
    assert all(".attn2." in name and name.startswith(UNET) for name in adapted)
    assert trained
    assert all(".lora_" in name for name in trained)


def test_implicit_captioner_gradient_through_the_unet(work, data):
    arguments = model_arguments(work, grid_size=8, guidance_scales=[1.0], fusion="none", implicit_caption_tokens=2)
    model = randomised(build_model(read_source(arguments)))
    batch = in_double(batch_for(arguments, data))
    for parameter in (model.model.implicit_captioner.linear_1.weight, model.model.implicit_captioner.linear_2.weight):
        finite_difference_check(model, parameter, batch)
    loss = model(**batch).loss
    loss.backward()
    assert all(p.grad is None for p in model.model.diffusion_tower.parameters())


def test_unet_lora_without_a_tower_raises(work):
    arguments = ModelArguments(vision=str(work / "clip"), language_model=str(work / "lm"))
    model = build_model(read_source(arguments))
    with pytest.raises(ValueError, match="needs a diffusion tower"):
        inject_unet_lora(model, 2, 4)
