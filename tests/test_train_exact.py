"""Runs that should be equal are, frozen parts stay, and gradients through the frozen UNet are right."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from train_fixtures import command, losses, weights, write_colours, write_parts

from sdllava.data.sources import DataSource, load_data
from sdllava.modeling_sdllava import SDLlavaForConditionalGeneration
from sdllava.train.adapters import inject_unet_lora
from sdllava.train.arguments import AdapterArguments, ModelArguments
from sdllava.train.build import build_model, build_processor
from sdllava.train.collator import SDLlavaCollator
from sdllava.train.run import train
from sdllava.train.stages import count_parameters, estimate_memory


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("work")
    write_parts(root)
    write_colours(root / "data", n=8)
    return root


SGD = {"optim": "sgd", "learning_rate": 0.5}
"""Adam turns rounding into whole steps where a gradient is nearly zero, so equal weights need a plainer optimizer."""


@pytest.fixture(scope="module")
def base(work) -> Path:
    """A run of four steps of four samples, which others should equal."""
    train(command(work, "base", **SGD))
    return work / "base"


def assert_same_run(folder: Path, base: Path) -> None:
    assert losses(folder) == pytest.approx(losses(base), abs=1e-5)
    expected = weights(base)
    for name, tensor in weights(folder).items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=0, msg=name)


def model_arguments(work: Path, stage: str = "finetune", **fields) -> ModelArguments:
    parts = {"diffusion": str(work / "sd2"), "vision": str(work / "clip"), "language_model": str(work / "lm")}
    sizes = {"image_size": 64, "grid_size": 4, "fusion_num_attention_heads": 4}
    return ModelArguments(stage=stage, **{**parts, **sizes, **fields})


def batch_for(arguments: ModelArguments, work: Path, n: int = 2) -> dict:
    data = load_data([DataSource(str(work / "data" / "colours.json"))])
    return SDLlavaCollator(build_processor(arguments))([data[i] for i in range(n)])


@pytest.mark.parametrize(
    "split",
    [
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"global_batch_size": 4, "per_device_train_batch_size": 1},
    ],
)
def test_batch_equals_accumulation(work, base, split, request):
    name = f"split-{request.node.name[-6:-1]}"
    train(command(work, name, **split, **SGD))
    assert_same_run(work / name, base)


@pytest.mark.slow
def test_two_processes_equal_one(work, base):
    arguments = command(work, "gloo", per_device_train_batch_size=2, **SGD)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29613"]
    result = subprocess.run([*launcher, "-m", "sdllava.train", *arguments], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    assert_same_run(work / "gloo", base)


def test_streamed_equals_not_streamed(work):
    two_passes = {"prompt_dropout": 0.3, **SGD}
    train(command(work, "indexed", train_sampling_strategy="sequential", **two_passes))
    train(command(work, "streamed", streaming="true", **two_passes))
    assert_same_run(work / "streamed", work / "indexed")


def test_checkpointed_equals_not(work):
    """Also where gradients pass through the UNet and its taps."""
    flags = {"fusion": "concat", "unet_lora_r": 2, "lora_dropout": 0.0, "guidance_scales": 1, **SGD}
    train(command(work, "kept", **flags))
    train(command(work, "recomputed", gradient_checkpointing="true", **flags))
    assert_same_run(work / "recomputed", work / "kept")


def test_half_precision_holds_what_trains_in_float32_and_saves_it_in_half(work):
    train(command(work, "half", bf16="true", dtype="bfloat16"))
    assert weights(work / "half")["lm_head.weight"].dtype == torch.bfloat16
    checkpoint = weights(work / "half" / "checkpoint-4")
    assert checkpoint["lm_head.weight"].dtype == torch.float32
    assert checkpoint["model.vision_tower.post_layernorm.weight"].dtype == torch.bfloat16
    assert losses(work / "half")[-1] < losses(work / "half")[0]


def test_batches_by_length_hold_alike_samples(work, monkeypatch):
    samples = json.loads((work / "data" / "colours.json").read_text())[:8] * 8
    for i, sample in enumerate(samples):
        answer = sample["conversations"][1]["value"] + " red" * (i % 3 * 10)
        samples[i] = {**sample, "conversations": [sample["conversations"][0], {"from": "gpt", "value": answer}]}
    (work / "data" / "lengths.json").write_text(json.dumps(samples))
    batches = []
    collate = SDLlavaCollator.__call__
    monkeypatch.setattr(SDLlavaCollator, "__call__", lambda self, rows: batches.append(rows) or collate(self, rows))
    data = {"train_data": work / "data" / "lengths.json", "train_sampling_strategy": "group_by_length"}
    train(command(work, "by-length", **data, per_device_train_batch_size=2, max_steps=8))
    kinds = [{len(row["messages"][-1]["content"].split()) // 10 for row in batch} for batch in batches[:8]]
    # the sampler sorts 16 samples at a time, so three kinds meet in two of eight batches at most
    assert set.union(*kinds) == {0, 1, 2}
    assert sum(len(kind) > 1 for kind in kinds) <= 2


def test_streams_need_max_steps(work):
    with pytest.raises(ValueError, match="set max_steps"):
        train(command(work, "endless", streaming="true", max_steps=-1))


def test_global_batch_must_divide(work):
    with pytest.raises(ValueError, match="global_batch_size=6 is no multiple of 4"):
        train(command(work, "odd", global_batch_size=6))


@pytest.mark.parametrize(
    ("stage", "trained"),
    [
        ("align", ("model.fusion.", "model.multi_modal_projector.")),
        ("finetune", ("model.fusion.", "model.multi_modal_projector.", "model.language_model.", "lm_head.")),
    ],
)
def test_frozen_parts_are_bitwise_unchanged(work, stage, trained):
    torch.manual_seed(0)
    before = build_model(model_arguments(work), AdapterArguments()).state_dict()
    train(command(work, f"frozen-{stage}", stage=stage, diffusion_prompt="none", max_steps=2, save_steps=2))
    after = weights(work / f"frozen-{stage}")
    frozen = [name for name in after if not name.startswith(trained)]
    assert len(frozen) > 100
    assert all(torch.equal(after[name], before[name]) for name in frozen)
    for part in trained:
        assert any(not torch.equal(after[name], before[name]) for name in after if name.startswith(part)), part


def test_frozen_parts_hold_no_gradient(work):
    arguments = model_arguments(work, stage="align")
    model = build_model(arguments, AdapterArguments()).train()
    model(**batch_for(arguments, work)).loss.backward()
    for name, parameter in model.named_parameters():
        is_trained = name.startswith(("model.fusion.", "model.multi_modal_projector."))
        assert parameter.requires_grad == is_trained, name
        assert is_trained or parameter.grad is None, name
    assert all(not module.training for module in model.model.diffusion_tower.backbone.modules())


def test_counts_and_memory(work):
    model = build_model(model_arguments(work, stage="align"), AdapterArguments())
    counts = {count.name: count for count in count_parameters(model)}
    assert counts["language model"].trained == counts["diffusion model"].trained == 0
    projector = model.model.multi_modal_projector
    assert counts["projector"].trained == sum(p.numel() for p in projector.parameters())
    assert sum(c.trained + c.frozen for c in counts.values()) == sum(p.numel() for p in model.parameters())
    memory = estimate_memory(model, batch_size=2, length=10, checkpointing=False)
    assert memory.weights == sum(p.numel() * 4 for p in model.parameters())
    assert memory.optimizer == 2 * memory.gradients == 8 * sum(c.trained for c in counts.values())
    assert memory.activations == 34 * 2 * 10 * 32 * 2


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


def test_lora_gradient_through_the_unet(work):
    arguments = model_arguments(work, grid_size=2, guidance_scales=[1.0])
    model = randomised(build_model(arguments, AdapterArguments(unet_lora_r=2, lora_dropout=0.0)))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    batch = in_double(batch_for(arguments, work))
    tapped = "up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_q.lora_A"
    early = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v.lora_B"
    for place in (tapped, early):
        parameter = next(p for name, p in model.named_parameters() if place in name)
        finite_difference_check(model, parameter, batch)


def test_unet_lora_sits_in_cross_attention_alone(work):
    model = build_model(model_arguments(work), AdapterArguments(unet_lora_r=2))
    adapted = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A." in name}
    places = [
        f"model.diffusion_tower.backbone.unet.{name}"
        for name, module in build_model(
            model_arguments(work), AdapterArguments()
        ).model.diffusion_tower.unet.named_modules()
        if isinstance(module, torch.nn.Linear) and ".attn2." in name
    ]
    assert adapted == set(places)
    assert len(places) > 20
    trained = {name for name, p in model.named_parameters() if p.requires_grad and ".diffusion_tower." in name}
    assert trained
    assert all(".lora_" in name for name in trained)


def test_implicit_captioner_gradient_through_the_unet(work):
    arguments = model_arguments(work, grid_size=2, guidance_scales=[1.0], fusion="none", implicit_caption_tokens=2)
    model = randomised(build_model(arguments, AdapterArguments()))
    batch = in_double(batch_for(arguments, work))
    for parameter in (model.model.implicit_captioner.linear_1.weight, model.model.implicit_captioner.linear_2.weight):
        finite_difference_check(model, parameter, batch)
    loss = model(**batch).loss
    loss.backward()
    assert all(p.grad is None for p in model.model.diffusion_tower.parameters())


def test_unet_lora_without_a_tower_is_refused(work):
    arguments = ModelArguments(vision=str(work / "clip"), language_model=str(work / "lm"))
    model = build_model(arguments, AdapterArguments())
    with pytest.raises(ValueError, match="no diffusion tower"):
        inject_unet_lora(model, 2, 4)
