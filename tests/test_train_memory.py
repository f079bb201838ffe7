"""The memory estimate against the allocator's peak in training steps of the miniature on the CPU."""

import pytest
import tiny
import tiny_families
import torch
from torch.profiler import ProfilerActivity, profile

from sdllava import SDLlavaConfig, SDLlavaForConditionalGeneration, mini_path
from sdllava.train.memory import estimate_memory, print_memory

BATCH, LENGTH = 4, 128


def measured_peak(model, checkpointing):
    """Bytes at the peak of the second step: weights, optimizer states, and what the step allocates."""
    config = model.config
    ids = torch.full((BATCH, LENGTH), 5)
    ids[:, : config.num_image_tokens] = config.image_token_id
    side = config.vision_config.image_size
    batch = {
        "input_ids": ids,
        "labels": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.zeros(BATCH, 3, side, side),
        "diffusion_pixel_values": torch.zeros(BATCH, 3, *[config.diffusion_config.image_size] * 2),
        "diffusion_input_ids": torch.full((BATCH, 77), 3),
    }
    if checkpointing:
        model.model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    for step in range(2):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=step == 1) as profiler:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    states = sum(p.numel() * p.element_size() for p in trained) * 2
    return peak + states + sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_estimate_is_within_15_percent_of_the_measured_peak(checkpointing):
    model = SDLlavaForConditionalGeneration.from_pretrained(mini_path()).train()
    model.set_stage("finetune")
    estimated = estimate_memory(model, BATCH, LENGTH, checkpointing).total
    assert estimated == pytest.approx(measured_peak(model, checkpointing), rel=0.15)


@pytest.mark.slow
def test_zero_divides_the_states_among_processes(composed):
    model = SDLlavaForConditionalGeneration.from_pretrained(composed)
    model.set_stage("align")
    one = estimate_memory(model, 1, 10, checkpointing=False)
    for stage, parts in enumerate(((1, 1, 1), (1, 1, 4), (1, 4, 4), (4, 4, 4))):
        shared = estimate_memory(model, 1, 10, checkpointing=False, zero_stage=stage, processes=4)
        expected = [size // part for size, part in zip((one.weights, one.gradients, one.optimizer), parts, strict=True)]
        assert [shared.weights, shared.gradients, shared.optimizer] == expected
        assert shared.activations == one.activations


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pixart", "if"])
def test_every_family_is_estimated(kind):
    tower = tiny_families.diffusion_config(kind)
    config = SDLlavaConfig(
        text_config=tiny.text_config(), vision_config=None, diffusion_config=tower, image_token_index=5
    )
    with torch.device("meta"):
        model = SDLlavaForConditionalGeneration(config)
    model.set_stage("finetune")
    one, two = (estimate_memory(model, n, config.num_image_tokens + 20, checkpointing=True) for n in (1, 2))
    assert one.weights == sum(p.numel() * p.element_size() for p in model.parameters())
    assert one.activations < two.activations < 3 * one.activations


def test_images_have_the_size_that_the_model_is_configured_for():
    """DINOv2 is published for 518 pixels and read at 224."""
    config = tiny.config(diffusion=None, vision="dinov2", vision_image_size=16)
    with torch.device("meta"):
        small = SDLlavaForConditionalGeneration(config)
        large = SDLlavaForConditionalGeneration(tiny.config(diffusion=None, vision="dinov2"))
    one, two = (estimate_memory(model.train(), 1, 20, checkpointing=False) for model in (small, large))
    assert config.num_image_tokens == 4
    assert one.weights == two.weights
    assert one.activations < two.activations


@pytest.mark.slow
def test_a_run_prints_its_memory_except_on_a_cpu(composed, capsys):
    with torch.device("meta"):
        model = SDLlavaForConditionalGeneration(SDLlavaConfig.from_pretrained(composed))
    model.set_stage("align")
    print_memory(model, 1, 10, checkpointing=False)
    total = estimate_memory(model, 1, 10, checkpointing=False).total
    assert f"Estimated memory per process, unsharded: {total / 2**30:.2f} GiB" in " ".join(
        capsys.readouterr().out.split()
    )
    if not torch.accelerator.is_available():
        print_memory(SDLlavaForConditionalGeneration.from_pretrained(composed), 1, 10, checkpointing=False)
        printed = capsys.readouterr().out
        assert "projector" in printed
        assert "Estimated memory" not in printed
