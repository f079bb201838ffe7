"""The loss is only on answers, token by token; placeholders are never cut; what a batch holds."""

import numpy as np
import PIL.Image
import pytest
import torch

from sdllava.data.prompts import PromptOptions
from sdllava.data.records import RecordError, to_record
from sdllava.processors import SDLlavaProcessor
from sdllava.train.check import check_data, require_supervision
from sdllava.train.collator import SDLlavaCollator
from sdllava.train.tokens import IGNORED, LLAVA_PLAIN, tokenize_record

SIZES = {"image_size": 64, "grid_size": 4, "fusion_grid_size": 2, "fusion_num_attention_heads": 4}


@pytest.fixture(scope="module")
def processor(training_parts) -> SDLlavaProcessor:
    parts = {"diffusion": "sd2", "vision": "clip", "language_model": "lm"}
    return SDLlavaProcessor.from_component_pretrained(
        **{part: str(training_parts / name) for part, name in parts.items()}, **SIZES
    )


def image(value: int = 0) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.full((20, 30, 3), value, np.uint8))


def conversation(*contents: str, n_images: int = 0) -> dict:
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return {"images": [image(40 * i) for i in range(n_images)], "messages": messages}


TWO_TURNS = ("<image>\nwhat colour", "red", "<image>\nthe thing ?", "left green")


def test_masks_of_two_turns_and_two_images(processor):
    tokens = tokenize_record(processor, to_record(conversation(*TWO_TURNS, n_images=2)))
    vocabulary = processor.tokenizer.get_vocab()
    system = processor.tokenizer(
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions.",
        add_special_tokens=False,
    )["input_ids"]
    pieces = [
        ("<s>", 0), *[(None, 0)] * len(system),
        ("USER:", 0), *[("<image>", 0)] * 4, ("\n", 0), ("what", 0), ("colour", 0),
        ("ASSISTANT:", 0), ("red", 1), ("</s>", 1),
        ("USER:", 0), *[("<image>", 0)] * 4, ("\n", 0), ("the", 0), ("thing", 0), ("?", 0),
        ("ASSISTANT:", 0), ("left", 1), ("green", 1), ("</s>", 1),
    ]  # fmt: skip
    rest = iter(system)
    ids = [vocabulary[piece] if piece else next(rest) for piece, _ in pieces]
    assert tokens.input_ids == ids
    assert tokens.labels == [token if mask else IGNORED for token, (_, mask) in zip(ids, pieces, strict=True)]


def test_masks_equal_the_processors_own(processor):
    record = to_record(conversation(*TWO_TURNS, n_images=2))
    chat = [
        {"role": "user", "content": [{"type": "image", "image": image()}, {"type": "text", "text": "what colour"}]},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": [{"type": "image", "image": image()}, {"type": "text", "text": "the thing ?"}]},
        {"role": "assistant", "content": "left green"},
    ]
    slow = processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
    )
    fast = tokenize_record(processor, record)
    assert fast.input_ids == slow["input_ids"][0].tolist()
    assert [label != IGNORED for label in fast.labels] == slow["assistant_masks"][0].bool().tolist()


def test_context_before_the_supervised_answer_is_left_out(processor):
    row = conversation(*TWO_TURNS, n_images=2)
    record = to_record(row)
    record["supervised_from"] = 3
    supervised = [label for label in tokenize_record(processor, record).labels if label != IGNORED]
    assert processor.tokenizer.decode(supervised) == "left green </s>"


def test_plain_template_is_image_tokens_then_caption(processor):
    tokens = tokenize_record(
        processor, to_record(conversation("<image>\nwhat is", "red thing", n_images=1)), LLAVA_PLAIN
    )
    assert processor.tokenizer.convert_ids_to_tokens(tokens.input_ids) == ["<s>"] + ["<image>"] * 4 + [
        "red",
        "thing",
        "\n",
        "</s>",
    ]
    assert tokens.labels == [IGNORED] * 5 + tokens.input_ids[5:]


def test_truncation_never_cuts_placeholders_or_all_answers(processor):
    record = to_record(conversation(*TWO_TURNS, n_images=2))
    whole = tokenize_record(processor, record)
    length = len(whole.input_ids)
    cut = tokenize_record(processor, record, max_length=length - 2)
    assert cut.input_ids == whole.input_ids[:-2]
    assert cut.labels == whole.labels[:-2]
    with pytest.raises(RecordError, match=f"placeholders up to token {length - 8}, beyond max_length={length - 10}"):
        tokenize_record(processor, record, max_length=length - 10)
    text_only = to_record(conversation("what is the thing ?", "red"))
    with pytest.raises(RecordError, match="no supervised token"):
        tokenize_record(processor, text_only, max_length=20)


def test_a_template_without_generation_markers_raises(processor):
    with pytest.raises(ValueError, match="does not mark answers"):
        tokenize_record(processor, to_record(conversation("what", "red")), "{{ messages[0]['content'] }}")


def test_require_supervision_names_the_sample(processor):
    rows = [conversation("what", "red"), {**conversation("what " * 40, "red"), "name": "data.json:7"}]
    collator = SDLlavaCollator(processor, max_length=60)
    with pytest.raises(ValueError, match=r"data\.json:7 has no supervised token"):
        require_supervision(rows, collator)
    require_supervision(rows, SDLlavaCollator(processor, max_length=60, skip_bad_samples=True))
    require_supervision(rows, SDLlavaCollator(processor, max_length=None))
    with pytest.raises(ValueError, match="no usable sample"):
        require_supervision(rows[1:], SDLlavaCollator(processor, max_length=60, skip_bad_samples=True))


def test_require_supervision_tokenizes_only_what_may_be_too_long(processor, monkeypatch):
    collator, tokenized = SDLlavaCollator(processor, max_length=1024), []
    tokens = collator.tokens
    monkeypatch.setattr(collator, "tokens", lambda record: tokenized.append(record) or tokens(record))
    rows = [conversation(text, "red") for text in ("what", "what ?", "what " * 300, "what is it ?")]
    require_supervision(rows, collator)
    assert [record["messages"][0]["content"].count("what") for record in tokenized] == [1, 300]


def test_a_template_that_never_stops_raises(processor):
    template = "{% for m in messages %}{% generation %}{{ m['content'] | string }}{% endgeneration %}{% endfor %}"
    with pytest.raises(ValueError, match="would not learn to stop"):
        require_supervision([conversation("what", "red")], SDLlavaCollator(processor, template=template))


def test_batch(processor):
    rows = [
        conversation(*TWO_TURNS, n_images=2),
        conversation("what ?", "red"),
        conversation("what ?", "blue", n_images=1),
    ]
    batch = SDLlavaCollator(processor, seed=3)(rows)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert batch["pixel_values"].shape == (3, 3, 32, 32)
    assert batch["diffusion_pixel_values"].shape == (3, 3, 64, 64)
    assert batch["diffusion_input_ids"].shape == (3, 77)
    assert batch["diffusion_noise_seed"].shape == (3,)
    for i, row in enumerate(rows):
        tokens = tokenize_record(processor, to_record(row))
        n = len(tokens.input_ids)
        assert batch["attention_mask"][i].tolist() == [1] * n + [0] * (batch["input_ids"].shape[1] - n)
        assert batch["input_ids"][i, :n].tolist() == tokens.input_ids
        assert batch["labels"][i].tolist() == tokens.labels + [IGNORED] * (batch["input_ids"].shape[1] - n)


def test_prompts_reach_only_the_diffusion_tokenizer(processor):
    rows = [conversation(*TWO_TURNS, n_images=2)]
    plain = SDLlavaCollator(processor, prompts=PromptOptions("none"))(rows)
    assert "diffusion_input_ids" not in plain
    for options in (PromptOptions("caption"), PromptOptions("question")):
        batch = SDLlavaCollator(processor, prompts=options)(rows)
        assert torch.equal(batch["input_ids"], plain["input_ids"])
    expected = processor.tokenize_questions(["red", "left green"], return_tensors="pt")["diffusion_input_ids"]
    assert torch.equal(
        SDLlavaCollator(processor, prompts=PromptOptions("caption"))(rows)["diffusion_input_ids"], expected
    )


def test_random_choices_depend_only_on_seed_epoch_and_sample(processor):
    rows = [conversation(f"<image>\nwhat {i}", "red", "the left ?", "blue", n_images=1) for i in range(6)]
    collator = SDLlavaCollator(processor, seed=5)
    whole = collator(rows)
    parts = [collator(rows[3:]), collator(rows[:3])]
    seeds = torch.cat([parts[1]["diffusion_noise_seed"], parts[0]["diffusion_noise_seed"]])
    assert torch.equal(whole["diffusion_noise_seed"], seeds)
    prompts = torch.cat([parts[1]["diffusion_input_ids"], parts[0]["diffusion_input_ids"]])
    assert torch.equal(whole["diffusion_input_ids"], prompts)
    collator.set_epoch(1)
    assert not torch.equal(collator(rows)["diffusion_noise_seed"], seeds)
    by_row = collator([{**row, "epoch": 0} for row in rows])
    assert torch.equal(by_row["diffusion_noise_seed"], seeds)
    assert "diffusion_noise_seed" not in collator.for_evaluation()(rows)


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_see_the_epoch(processor, persistent):
    rows = [conversation("<image>\nwhat", "red", n_images=1)] * 2
    collator = SDLlavaCollator(processor, seed=0)
    loader = torch.utils.data.DataLoader(
        rows, batch_size=1, collate_fn=collator, num_workers=1, persistent_workers=persistent
    )
    for epoch in (0, 1, 2):
        collator.set_epoch(epoch)
        expected = collator(rows[:1])["diffusion_noise_seed"]
        assert all(torch.equal(batch["diffusion_noise_seed"], expected) for batch in loader)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_without_a_seed_each_epoch_has_its_own_noise(processor, num_workers):
    rows = [conversation("<image>\nwhat", "red", n_images=1)] * 2
    loader = torch.utils.data.DataLoader(rows, collate_fn=SDLlavaCollator(processor), num_workers=num_workers)
    seeds = [int(batch["diffusion_noise_seed"]) for _ in range(2) for batch in loader]
    assert len(set(seeds)) == 4
    assert min(seeds) >= 0


def test_rows_without_columns_name_the_setting(processor):
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        SDLlavaCollator(processor, skip_bad_samples=True)([{}, {}])


def test_bad_samples_are_named_or_contribute_nothing(processor, tmp_path):
    good = conversation("<image>\nwhat", "red", n_images=1)
    bad = {**good, "images": ["none.png"], "folder": str(tmp_path), "name": "data.json:4"}
    with pytest.raises(ValueError, match=r"data\.json:4 names the image 'none\.png', which is not in the image folder"):
        SDLlavaCollator(processor)([good, bad])
    with pytest.raises(ValueError, match=r"data\.json:5 is not a sample"):
        SDLlavaCollator(processor)([good, {"name": "data.json:5", "error": "is not a sample"}])
    batch = SDLlavaCollator(processor, skip_bad_samples=True)([good, bad])
    assert (batch["labels"][1] == IGNORED).all()
    assert (batch["labels"][0] != IGNORED).any()
    assert batch["pixel_values"].shape[0] == 2
    assert (batch["input_ids"][1] == processor.image_token_id).sum() == processor.num_image_tokens


def test_stage_align_needs_images(processor):
    with pytest.raises(ValueError, match="sample 0 has no image, which stage align needs"):
        require_supervision([conversation("what", "red")], SDLlavaCollator(processor, require_images=True))


def test_check_data_reports_everything(processor, tmp_path):
    image().save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes(b"x")
    rows = [
        {**conversation("<image>\nwhat", "red"), "images": ["a.png"], "folder": str(tmp_path), "name": "d:1"},
        {**conversation("<image>\nwhat", "red"), "images": ["broken.png"], "folder": str(tmp_path), "name": "d:2"},
        {"name": "d:3", "error": "is not a JSON object"},
        {**conversation("what", "red " * 50), "name": "d:4"},
    ]
    report = check_data(rows, SDLlavaCollator(processor, max_length=60), n_shown=1)
    assert (report.samples, report.images, report.text_only, report.answers) == (4, 1, 1, 2)
    assert [entry.split()[0] for entry in report.bad] == ["d:2", "d:3"]
    assert report.truncated[0].startswith("d:4 has")
    text = report.summary()
    assert "USER:<image>*4\n what ASSISTANT:[[red </s>]]" in text
    assert "unreadable: d:3 is not a JSON object" in text
    assert "truncated: d:4" in text
    prompts = PromptOptions(pseudo_captions={"b.png": "a cat"})
    report = check_data(rows[:1], SDLlavaCollator(processor, prompts))
    assert report.bad == ["d:1 has the image 'a.png', for which there is no pseudo-caption"]


def test_the_question_of_a_sample_answer(processor):
    question, expected, inputs = SDLlavaCollator(processor).question(conversation(*TWO_TURNS, n_images=2))
    assert (question, expected) == ("what colour", "red")
    assert processor.tokenizer.decode(inputs["input_ids"][0]).endswith("ASSISTANT:")
    assert inputs["pixel_values"].shape[0] == 1
