"""The miniature's parts at the smoke scale: stopped, resumed, written, and loaded by the published loaders."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from research.miniature import stages
from research.miniature.images import to_pixels
from research.miniature.judge import labels
from research.miniature.loop import Run, mixed_precision
from research.miniature.pretrain import CheckFailedError, build, pretrain, train_part
from research.miniature.prompts import PromptPart
from research.miniature.scales import PARTS, SCALES, Gate
from research.miniature.ship import write_checkpoint
from sdllava import mini_path
from sdllava.scenes.language import caption
from sdllava.scenes.render import render
from sdllava.scenes.world import sample_scene
from sdllava.train.trainer import SDLlavaTrainer


@pytest.fixture
def parts(smoke_miniature):
    return smoke_miniature


def scene_of(count):
    """A scene with this number of objects."""
    return next(s for s in (sample_scene("train", seed) for seed in range(50)) if len(s.objects) == count)


class StoppedError(Exception):
    pass


SLOW = ("vae", "denoiser", "unet")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in PARTS]
)
def test_a_killed_training_ends_with_the_same_weights(name, parts, tmp_path, monkeypatch):
    for folder in ("diffusion", "clip", "prompts", "denoiser"):
        (tmp_path / folder).symlink_to(parts / folder)
    scale = SCALES["smoke"]
    part = build(name, scale, tmp_path, seed=0)
    run = Run(part, scale.budgets[name], tmp_path / "state")
    whole_loss = part.loss

    def loss(step, batch_size):
        if step == 3:  # after the checkpoint of step 2 and one step more, which is lost
            raise StoppedError
        return whole_loss(step, batch_size)

    monkeypatch.setattr(part, "loss", loss)
    with pytest.raises(StoppedError):
        run.train()
    resumed = Run(build(name, scale, tmp_path, seed=0), scale.budgets[name], tmp_path / "state")
    assert resumed.step == 2
    resumed.train()
    ours, theirs = load_file(resumed.state_file), load_file(parts / "state" / f"{name}.safetensors")
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key


def test_a_finished_folder_is_left_as_it_is(parts):
    before = {file: file.stat().st_mtime_ns for file in parts.rglob("*") if file.is_file()}
    pretrain("smoke", parts)
    assert before == {file: file.stat().st_mtime_ns for file in parts.rglob("*") if file.is_file()}


def test_a_checkpoint_of_another_seed_is_not_resumed(parts):
    with pytest.raises(ValueError, match=r"was written with other settings: seed is 0 there and 1 here\."):
        train_part("vae", SCALES["smoke"], parts, seed=1)


@pytest.mark.parametrize(
    ("scale", "seed", "difference"),
    [("mini", 0, "scale is 'smoke' there and 'mini' here"), ("smoke", 1, "seed is 0 there and 1 here")],
)
def test_a_finished_folder_of_another_scale_or_seed_raises(scale, seed, difference, parts):
    with pytest.raises(ValueError, match=f"was written with other settings: {difference}"):
        pretrain(scale, parts, seed=seed)


@pytest.mark.parametrize(
    ("device", "message"), [("cuda", "--device 'cuda' is not available"), ("gpu", "--device 'gpu' is not a device")]
)
def test_an_unusable_device_raises_before_anything_is_written(device, message, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        pretrain("smoke", tmp_path, device=device)
    assert not any(tmp_path.iterdir())


def test_a_part_below_its_gate_is_not_written(tmp_path):
    smoke = SCALES["smoke"]
    scale = type(smoke)(**{**vars(smoke), "gates": {"vae": Gate("psnr", 99.0, " dB")}})
    with pytest.raises(CheckFailedError, match=r"'vae' has a psnr of .* dB on held-out scenes, below the 99 dB"):
        train_part("vae", scale, tmp_path)
    assert not (tmp_path / "diffusion").exists()
    assert not (tmp_path / "checks.json").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("tiny",), r"Scale 'tiny' of the miniature is unknown\. Use one of smoke, mini, gpu\."),
        (("smoke", ("vae", "gan")), r"Part 'gan' of the miniature is unknown\. Use one of judge, vae, clip, llm, "),
    ],
)
def test_unknown_names_raise_with_the_known_ones(arguments, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        pretrain(arguments[0], tmp_path, *arguments[1:])
    assert not any(tmp_path.iterdir())


def test_the_parts_are_in_the_published_layouts(parts):
    from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    pipeline = StableDiffusionPipeline.from_pretrained(parts / "diffusion")
    assert pipeline.vae.config.scaling_factor != 0.18215
    assert pipeline.tokenizer.pad_token_id == 0
    assert pipeline.tokenizer.model_max_length == 77
    clip = CLIPModel.from_pretrained(parts / "clip")
    image = CLIPImageProcessor.from_pretrained(parts / "clip")(sample_image(), return_tensors="pt")["pixel_values"]
    assert image.shape == (1, 3, 64, 64)
    assert image.min() >= -1
    assert clip.vision_model(image).last_hidden_state.shape[1] == 8 * 8 + 1
    assert CLIPTokenizer.from_pretrained(parts / "clip").pad_token_id == clip.config.text_config.eos_token_id
    llama = AutoModelForCausalLM.from_pretrained(parts / "llm")
    assert llama.config.vocab_size == len(AutoTokenizer.from_pretrained(parts / "llm"))


@pytest.mark.parametrize("name", ["denoiser", "unet"])
def test_the_denoiser_predicts_noise_and_the_unet_starts_from_it_and_predicts_the_velocity(name, parts):
    part = build(name, SCALES["smoke"], parts, seed=0)
    pixels, prompts = to_pixels([scene_of(2), scene_of(3)]), ["", ""]
    if name == "unet":
        learnt = load_file(parts / "denoiser" / "unet" / "diffusion_pytorch_model.safetensors")
        assert all(torch.equal(value, learnt[key]) for key, value in part.unet.state_dict().items())
    part.unet.conv_out.requires_grad_(False).weight.zero_()
    part.unet.conv_out.bias.zero_()  # a prediction of zero has the target as its error
    timesteps = torch.tensor([20, 700])
    torch.manual_seed(0)
    error = part._error(pixels, prompts, timesteps)
    torch.manual_seed(0)
    with mixed_precision(part.unet.device):
        latents = part.vae.encode(pixels).latent_dist.mode().float() * part.vae.config.scaling_factor
    noise = torch.randn(latents.shape)
    kept = part.scheduler.alphas_cumprod[timesteps].view(2, 1, 1, 1)
    target = noise if name == "denoiser" else kept.sqrt() * noise - (1 - kept).sqrt() * latents
    torch.testing.assert_close(error, target.square().mean())
    assert part.check(2)["wrong_caption_ratio"] == 1  # and it does not depend on the caption
    assert StableDiffusionPipeline.from_pretrained(parts / part.folder).scheduler.config.prediction_type == (
        "epsilon" if name == "denoiser" else "v_prediction"
    )


def test_the_unets_schedule_ends_in_pure_noise(parts):
    part = build("unet", SCALES["smoke"], parts, seed=0)
    assert part.scheduler.alphas_cumprod[-1] == 0
    assert part.scheduler.config.timestep_spacing == "trailing"
    torch.manual_seed(0)
    timesteps = part._timesteps(4000)
    assert timesteps.max() < 1000
    assert (timesteps[1::4] >= 900).all()
    assert timesteps[3::4].float().mean() == pytest.approx(500, abs=25)  # uniform
    assert timesteps[0::2].float().mean() == pytest.approx(667, abs=20)  # the later of two


def test_prompts_are_read_in_the_order_of_the_quadrants(parts):
    """The reader's rows have the order of the judge's labels, and the UNet's text encoder is the trained one."""
    part = build("prompts", SCALES["smoke"], parts, seed=0)
    assert isinstance(part, PromptPart)
    captions = [caption(scene_of(2)), caption(scene_of(3))]
    both, single = part._read(captions), part._read(captions[1:])
    for name, read in both.items():
        assert len(read) == len(labels([scene_of(2), scene_of(3)])[name])
        torch.testing.assert_close(read[4:], single[name])
    trained = load_file(parts / "prompts" / "model.safetensors")
    used = load_file(parts / "diffusion" / "text_encoder" / "model.safetensors")
    assert trained.keys() == used.keys()
    assert all(torch.equal(used[key], value) for key, value in trained.items())


def sample_image():
    return render(sample_scene("test", 0))


@pytest.fixture(scope="module")
def finished(smoke_miniature, tmp_path_factory):
    """The output of `python -m research.miniature train` at the smoke scale."""
    from typer.testing import CliRunner

    from research.miniature.__main__ import app

    folder = tmp_path_factory.mktemp("finished")
    for name in ("checks.json", "diffusion", "clip", "llm"):
        (folder / name).symlink_to(smoke_miniature / name)
    result = CliRunner().invoke(app, ["train", "--scale", "smoke", "--out", str(folder)], catch_exceptions=False)
    assert result.exit_code == 0
    assert result.stdout.endswith(f"Wrote the model to {folder / 'sdllava-mini'}\n")
    return folder


@pytest.mark.slow
def test_a_killed_stage_ends_with_the_same_weights(finished, tmp_path, monkeypatch):
    (tmp_path / "align").symlink_to(finished / "align")
    whole_step, steps = SDLlavaTrainer.training_step, []

    def step(*args, **kwargs):
        steps.append(None)
        if len(steps) == 2:
            raise StoppedError
        return whole_step(*args, **kwargs)

    monkeypatch.setattr(SDLlavaTrainer, "training_step", step)
    with pytest.raises(StoppedError):
        stages.train_stage("finetune", "smoke", tmp_path)
    assert not (tmp_path / "finetune" / "config.json").exists()
    ours = load_file(stages.train_stage("finetune", "smoke", tmp_path) / "model.safetensors")
    theirs = load_file(finished / "finetune" / "model.safetensors")
    assert len(steps) > 3
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())


@pytest.mark.slow
def test_the_parts_go_through_both_stages_and_the_result_answers(parts, finished):
    from sdllava import SDLlavaForConditionalGeneration, SDLlavaProcessor

    model = SDLlavaForConditionalGeneration.from_pretrained(finished / "sdllava-mini")
    processor = SDLlavaProcessor.from_pretrained(finished / "sdllava-mini")
    assert not model.config.diffusion_config.truncate
    content = [{"type": "image", "image": sample_image()}, {"type": "text", "text": "How many objects are there?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    assert (inputs["input_ids"] == processor.image_token_id).sum() == model.config.num_image_tokens == 16
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] > inputs["input_ids"].shape[1]
    before = load_file(parts / "llm" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    aligned = SDLlavaForConditionalGeneration.from_pretrained(finished / "align").model.language_model
    assert torch.equal(aligned.layers[0].mlp.up_proj.weight, before)
    assert not torch.equal(model.model.language_model.layers[0].mlp.up_proj.weight, before)


@pytest.mark.parametrize(
    ("stage", "kind", "start"),
    [
        ("align", "vision", {"--diffusion": "diffusion", "--vision": "clip", "--language_model": "llm"}),
        ("finetune", "conditional", {"--init_from": "align"}),
    ],
)
def test_a_stage_caches_its_features_and_trains_on_them(stage, kind, start, tmp_path, monkeypatch):
    calls = {}
    monkeypatch.setattr(stages, "cache", lambda arguments, folder, **options: calls.update(cache=(folder, options)))
    monkeypatch.setattr(stages, "train", lambda arguments: calls.update(train=arguments))
    assert stages.train_stage(stage, "smoke", tmp_path) == tmp_path / stage
    features = str(tmp_path / "cache" / stage)
    assert calls["cache"] == (features, {"kind": kind, "dtype": "bfloat16", "batch_size": 4})
    words = dict(zip(calls["train"][::2], calls["train"][1::2], strict=True))
    assert {key: words[key] for key in start} == {key: str(tmp_path / name) for key, name in start.items()}
    assert ("--init_from" in words) == (stage == "finetune")
    assert Path(words["--config"]).is_file()
    assert words["--feature_cache"] == features
    assert words["--train_data"] == str(tmp_path / "data" / f"{stage}.parquet")
    assert sorted(file.name for file in (tmp_path / "data").iterdir()) == [f"{stage}.parquet"]
    (tmp_path / stage).mkdir()
    (tmp_path / stage / "config.json").touch()
    calls.clear()
    stages.train_stage(stage, "smoke", tmp_path)
    assert not calls


@pytest.mark.slow
def test_the_checkpoint_is_written_in_half_precision_without_code(tmp_path):
    (tmp_path / "finetune").symlink_to(mini_path())
    (tmp_path / "checks.json").write_text('{"judge": {"accuracy": 0.98765}}')
    target = write_checkpoint(tmp_path)
    stored = load_file(target / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    assert json.loads((target / "config.json").read_text(encoding="utf-8"))["dtype"] == "float32"
    assert (target / "training.json").read_bytes() == (mini_path() / "training.json").read_bytes()
    assert not list(target.glob("*.py"))
    card = (target / "README.md").read_text(encoding="utf-8")
    assert "It only supports rendered scenes." in card
    assert "judge accuracy 0.988." in card
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checks.json", "finetune", "sdllava-mini"]


def test_every_tap_of_the_papers_table_exists_and_the_default_one_is_8x8(parts):
    from diffusers import UNet2DConditionModel

    from research.miniature.study.taps import TAPS
    from sdllava.taps import list_taps

    taps = {tap.name: tap for tap in list_taps(UNet2DConditionModel.from_pretrained(parts / "diffusion/unet").config)}
    for name in TAPS:
        assert name in taps
    assert (taps["U-L1-R1-B0-Cross-Q"].height, taps["U-L1-R1-B0-Cross-Q"].width) == (8, 8)
