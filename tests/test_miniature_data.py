"""What the miniature's parts learn from: words, packed questions, symbolic tokens, quadrants, prompts and scenes."""

import random

import pytest
import torch
from test_miniature import scene_of

from research.miniature.images import contact_sheet
from research.miniature.judge import JudgePart, labels, quadrants
from research.miniature.llm import LlamaPart, llama_config, pack, packed_mask, scene_words
from research.miniature.loop import Budget, Run, learning_rate, scene_numbers
from research.miniature.text import clip_tokenizer, llm_tokenizer, words_in
from research.miniature.unet import close_up, prompt_for
from sdllava.scenes.language import caption, describe, sample_question
from sdllava.scenes.world import sample_scene


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
