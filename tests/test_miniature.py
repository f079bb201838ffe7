"""The miniature's parts at the smoke scale: stopped, resumed, written, and loaded by the published loaders."""

import json
import random
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from research.miniature import stages
from research.miniature.images import contact_sheet, to_pixels
from research.miniature.judge import JudgePart, labels, quadrants
from research.miniature.llm import LlamaPart, llama_config, pack, packed_mask, scene_words
from research.miniature.loop import Budget, Run, learning_rate, scene_numbers
from research.miniature.pretrain import CheckFailedError, build, pretrain, train_part
from research.miniature.prompts import PromptPart
from research.miniature.scales import PARTS, SCALES, Gate
from research.miniature.ship import write_checkpoint
from research.miniature.text import clip_tokenizer, llm_tokenizer, words_in
from research.miniature.unet import close_up, prompt_for
from sdllava import mini_path
from sdllava.scenes.language import caption, describe, sample_question
from sdllava.scenes.render import render
from sdllava.scenes.world import sample_scene


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
    latents = part.vae.encode(pixels).latent_dist.mode() * part.vae.config.scaling_factor
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
@pytest.mark.parametrize("stage", ["align", "finetune"])
def test_a_killed_stage_ends_with_the_same_weights(stage, finished, tmp_path, monkeypatch):
    from research.miniature.stages import train_stage
    from sdllava.train.trainer import SDLlavaTrainer

    for name in ("diffusion", "clip", "llm", "align"):
        if name != stage:
            (tmp_path / name).symlink_to(finished / name)
    whole_step, steps = SDLlavaTrainer.training_step, []

    def step(*args, **kwargs):
        steps.append(None)
        if len(steps) == 2:
            raise StoppedError
        return whole_step(*args, **kwargs)

    monkeypatch.setattr(SDLlavaTrainer, "training_step", step)
    with pytest.raises(StoppedError):
        train_stage(stage, "smoke", tmp_path)
    assert not (tmp_path / stage / "config.json").exists()
    ours = load_file(train_stage(stage, "smoke", tmp_path) / "model.safetensors")
    theirs = load_file(finished / stage / "model.safetensors")
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


def test_every_word_is_one_token_of_both_tokenizers(tmp_path):
    llama, clip = llm_tokenizer(), clip_tokenizer(tmp_path, pad_token="!")
    assert clip.pad_token_id == 0
    for seed in range(120):
        scene, question = sample_question("train", seed)
        for text in (caption(scene), question.text, question.answer):
            count = len(words_in(text))
            assert len(llama(text).input_ids) == count + 1
            assert llama.unk_token_id not in llama(text).input_ids
            assert len(clip(text).input_ids) == count + 2 <= 77
    assert llama.decode(llama("top left").input_ids, skip_special_tokens=True) == "top left"


def test_the_chat_template_marks_only_the_answers():
    tokenizer = llm_tokenizer()
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where is the star?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "top left"}]},
        {"role": "user", "content": "Is it red?"},
        {"role": "assistant", "content": "no"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<s>USER: <image>\nWhere is the star? ASSISTANT: top left</s>USER: Is it red? ASSISTANT: no</s>"
    encoded = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    marked = [i for i, keep in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if keep]
    assert tokenizer.convert_ids_to_tokens(marked) == ["top", "left", "</s>", "no", "</s>"]


def test_packed_questions_equal_single_ones():
    torch.manual_seed(0)
    part = LlamaPart(llama_config(32, 2, 2), steps=10)
    llama, embed = part.model.llama.eval(), part.model.llama.get_input_embeddings()
    image = torch.randn(16, 32)
    turns = [([10, 11, 12], [20, 2]), ([13, 14], [21, 22, 2]), ([15], [23, 2])]

    def logits(turns):
        ids, labels, positions, segments = pack([1, 9, 8], turns)
        embeddings = torch.cat([embed(ids[:3]), image, embed(ids[19:])])[None]
        mask = torch.where(packed_mask(segments[None]), 0.0, torch.finfo(torch.float32).min)[:, None]
        out = llama(inputs_embeds=embeddings, attention_mask=mask, position_ids=positions[None]).logits[0]
        return out[:-1][labels[1:] != -100]

    with torch.no_grad():
        singly = torch.cat([logits([turn]) for turn in turns])
        torch.testing.assert_close(logits(turns), singly, atol=1e-5, rtol=1e-5)


def test_the_judge_finds_objects_in_their_quadrant_or_in_any():
    judge = JudgePart(4)
    scenes = [scene_of(2), scene_of(3)]
    record = labels(scenes)

    def agreement(scene_rows):
        """A judge that reads these rows of the scenes' own quadrants."""
        read = {
            name: torch.nn.functional.one_hot(values.clamp(min=0)[scene_rows], 9).float()
            for name, values in record.items()
        }
        judge.model.forward = lambda pixels: read
        return judge.agreement(torch.zeros(2, 3, 64, 64), scenes)

    own = torch.arange(8)
    assert set(agreement(own).values()) == {1.0}
    moved = agreement(own.view(2, 4).flip(1).flatten())  # every object in the opposite quadrant
    assert moved["anywhere"] == 1.0
    assert moved["object"] < 1.0
    other = agreement(own.view(2, 4).flip(0).flatten())  # the other scene
    assert other["anywhere"] < 1.0


def test_symbolic_tokens_of_equal_content_differ_only_while_they_have_positions():
    part = LlamaPart(llama_config(32, 1, 2), steps=16)
    scene = scene_of(1)
    for step, distinct in ((0, 16), (15, 2)):  # an object on four tokens, nothing on twelve
        tokens = part._image([scene], part.phase(step).placed)[0]
        assert len(tokens.unique(dim=0)) == distinct


def test_symbolic_tokens_describe_every_object_in_its_own_quadrant():
    scene = scene_of(2)
    words = scene_words(scene)
    for item in scene.objects:
        row, column = ("bottom" in item.cell), ("right" in item.cell)
        places = {(4 * (2 * row + r)) + 2 * column + c for r in (0, 1) for c in (0, 1)}
        assert {place for place in range(16) if item.colour in words[place]} == places
    assert all(token[0] == scene.viewpoint for token in words)


def test_the_judge_reads_quadrants_in_the_order_of_their_labels():
    pixels = torch.arange(64 * 64).view(1, 1, 64, 64).expand(1, 3, 64, 64)
    assert [int(q[0, 0, 0]) for q in quadrants(pixels)] == [0, 32, 32 * 64, 32 * 64 + 32]
    scene = sample_scene("train", 3)
    found = labels([scene])
    empty = {"top left", "top right", "bottom left", "bottom right"} - {o.cell for o in scene.objects}
    assert int((found["colour"] == 0).sum()) == len(empty)
    assert int((found["shape"] == -100).sum()) == len(empty)


@pytest.mark.slow
def test_the_judge_learns_to_read_scenes(tmp_path):
    torch.manual_seed(0)
    part = JudgePart(8)
    run = Run(part, Budget(150, 32, 3e-3, warmup=10), tmp_path)
    run.train()
    run.finish()
    assert part.check(64)["colour"] > 0.95


def test_a_contact_sheet_keeps_the_order_of_its_images():
    shades = torch.linspace(-1, 1, 3).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    sheet = contact_sheet(shades, columns=2)
    assert sheet.size == (4, 4)
    assert [sheet.getpixel(at)[0] for at in ((0, 0), (2, 0), (0, 2), (2, 2))] == [0, 128, 255, 255]


def test_prompts_are_captions_questions_and_empty():
    scene = sample_scene("train", 1)
    prompts = [prompt_for(scene, random.Random(seed)) for seed in range(2000)]
    shares = {
        "": prompts.count("") / 2000,
        "caption": prompts.count(caption(scene)) / 2000,
        "question": sum(prompt.endswith("?") for prompt in prompts) / 2000,
    }
    assert shares == pytest.approx({"": 0.12, "caption": 0.58, "question": 0.3}, abs=0.03)


def test_a_close_up_shows_the_object_that_it_describes():
    scene = scene_of(3)
    pixels = torch.arange(3 * 64 * 64).view(3, 64, 64)
    for seed in range(40):
        quadrant, prompt = close_up(scene, pixels, random.Random(seed))
        top, left = divmod(int(quadrant[0, 0, 0]), 64)
        described = next(
            o for o in scene.objects if o.cell == f"{'bottom' if top else 'top'} {'right' if left else 'left'}"
        )
        assert quadrant.shape == (3, 32, 32)
        assert prompt in ("", describe(described))


def test_the_rate_warms_up_stays_and_falls():
    budget = Budget(steps=100, batch_size=1, learning_rate=1.0, warmup=10)
    assert [learning_rate(budget, step) for step in (0, 9, 50, 80, 90, 99)] == [0.1, 1, 1, 1, 0.5, 0.05]


def test_no_two_steps_share_a_scene():
    numbers = [n for seed in (0, 1) for step in range(20) for n in scene_numbers(seed, step, 8)]
    assert len(set(numbers)) == len(numbers)


def test_written_scenes_are_training_data(tmp_path):
    from typer.testing import CliRunner

    from sdllava.commands.mini import app
    from sdllava.data.sources import DataSource, load_data

    arguments = ["scenes", str(tmp_path / "s.parquet"), "--count", "3", "--examples", str(tmp_path / "e.html")]
    assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0
    rows = list(load_data([DataSource(str(tmp_path / "s.parquet"))]))
    assert len(rows) == 3
    assert not any(row["error"] for row in rows)
    assert rows[0]["messages"][0]["content"].startswith("<image>")
    assert rows[0]["images"][0]["bytes"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["e.html", "s.parquet"]
    refused = CliRunner().invoke(app, ["scenes", str(tmp_path / "t.parquet"), "--split", "dev"])
    assert refused.exit_code == 1
    assert "Split 'dev' is unknown." in str(refused.exception) + refused.output
