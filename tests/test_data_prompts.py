"""The diffusion model's prompts: their content, their frequencies, and their dependence on (seed, epoch, sample)."""

import json
import math

import pytest

from sdllava import SDLlavaProcessor, mini_path
from sdllava.data.prompts import (
    PromptOptions,
    drop_words,
    image_turns,
    noise_seeds,
    possible_prompts,
    read_pseudo_captions,
    sample_generator,
    training_prompts,
)
from sdllava.data.records import RecordError, split_content, to_record
from sdllava.questions import questions_in_messages

TURNS = ["<image>\nq one", "a one", "q two", "a two", "<image>\nq three", "a three"]


def record(contents=TURNS, images=("a.png", "b.png")):
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return to_record({"images": list(images), "messages": messages})


def within_binomial_bounds(hits: int, trials: int, p: float) -> bool:
    return abs(hits - trials * p) < 4.5 * math.sqrt(trials * p * (1 - p))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (PromptOptions("none"), ["", ""]),
        (PromptOptions("caption"), ["a one", "a three"]),
        (PromptOptions("noisy_caption", word_dropout=0), ["a one", "a three"]),
        (PromptOptions("noisy_caption", word_dropout=1), ["", ""]),
        (PromptOptions("question", question="last"), ["q two", "q three"]),
        (PromptOptions("question", question="last", dropout=1), ["", ""]),
        (
            PromptOptions("question", question="last", pseudo_captions={"a.png": "a cat", "b.png": "a dog"}),
            ["q two a cat", "q three a dog"],
        ),
    ],
)
def test_prompts_per_image(options, expected):
    assert training_prompts(record(), options, seed=1, epoch=0, sample=2) == expected


def test_turns_of_each_image():
    assert image_turns(record()) == [[0, 2], [4]]
    assert image_turns(record(["<image>\n<image>\nq", "a", "r", "b"])) == [[0, 2], [0, 2]]
    assert training_prompts(record(["q", "a"], []), PromptOptions(), 0, 0, 0) == []


CONVERSATIONS = {
    "one image": (["<image>\nq one", "a"], ["a.png"]),
    "a follow-up question": (["<image>\nq one", "a", "q two", "b"], ["a.png"]),
    "two images of one turn": (["<image>\n<image>\nq one", "a", "q two", "b"], ["a.png", "b.png"]),
    "an image per turn": (["<image>\nq one", "a", "<image>\nq two", "b"], ["a.png", "b.png"]),
    "an image after two questions": (TURNS, ["a.png", "b.png"]),
    "a turn with only an image": (["q zero", "z", "<image>", "a", "q two", "b"], ["a.png"]),
    "only images": (["<image>", "a", "<image>", "b"], ["a.png", "b.png"]),
    "the last turn only an image": (["<image>\nq one", "a", "<image>\n", "b"], ["a.png", "b.png"]),
    "images within a sentence": (["Is <image> like <image> here?", "a"], ["a.png", "b.png"]),
    "a format instruction": (
        ["<image>\nq one\nAnswer the question using a single word or phrase.", "a", "q two", "b"],
        ["a.png"],
    ),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_training_and_the_processor_agree_which_question_belongs_to_which_image(name, mini_processor):
    sample = record(*CONVERSATIONS[name])
    messages = [{"role": m["role"], "content": split_content(m["content"])} for m in sample["messages"]]
    trained = training_prompts(sample, PromptOptions("question", question="last"), seed=0, epoch=0, sample=0)
    answered = questions_in_messages(messages)
    assert len(trained) == len(answered) == len(sample["images"])
    assert trained == [" ".join(question.split()) for question in answered]
    assert possible_prompts(sample, PromptOptions("question", question="last")) == [[prompt] for prompt in trained]
    ids = [mini_processor.tokenize_questions(prompts)["diffusion_input_ids"] for prompts in (trained, answered)]
    assert ids[0] == ids[1]


@pytest.fixture(scope="module")
def mini_processor():
    return SDLlavaProcessor.from_pretrained(mini_path())


def test_a_random_question_is_one_with_text():
    sample = record(["<image>", "a", "q two", "b", "q three", "c"], ["a.png"])
    drawn = {training_prompts(sample, PromptOptions("question"), 0, 0, i)[0] for i in range(50)}
    assert drawn == {"q two", "q three"}
    assert possible_prompts(sample, PromptOptions("question")) == [["q two", "q three"]]


def test_question_choice_is_uniform_and_repeatable():
    options = PromptOptions("question")
    sample = record(["<image>\nq one", "a", "q two", "b", "q three", "c"], ["a.png"])
    drawn = [training_prompts(sample, options, 3, 0, i)[0] for i in range(800)]
    for question in ("q one", "q two", "q three"):
        assert within_binomial_bounds(drawn.count(question), 800, 1 / 3)
    assert drawn[:100] == [training_prompts(sample, options, 3, 0, i)[0] for i in range(100)]
    assert drawn[:100] != [training_prompts(sample, options, 3, 1, i)[0] for i in range(100)]
    assert drawn[:100] != [training_prompts(sample, options, 4, 0, i)[0] for i in range(100)]


def test_dropout_rate_and_its_independence_of_the_question():
    sample = record(["<image>\nq one", "a", "q two", "b"], ["a.png"])
    plain = [training_prompts(sample, PromptOptions(), 0, 0, i)[0] for i in range(800)]
    dropped = [training_prompts(sample, PromptOptions(dropout=0.3), 0, 0, i)[0] for i in range(800)]
    assert within_binomial_bounds(dropped.count(""), 800, 0.3)
    assert all(prompt in ("", other) for prompt, other in zip(dropped, plain, strict=True))
    kept_first = sum(prompt == "q one" for prompt in dropped)
    assert within_binomial_bounds(kept_first, 800, 0.7 * 0.5)


def test_word_dropout_rate():
    text = " ".join(f"w{i}" for i in range(20))
    kept = [drop_words(text, 0.3, sample_generator(0, 0, i, "words")).split() for i in range(600)]
    assert within_binomial_bounds(sum(map(len, kept)), 12000, 0.7)
    for word in ("w0", "w7", "w19"):
        assert within_binomial_bounds(sum(word in words for words in kept), 600, 0.7)
    assert all(words == sorted(words, key=lambda word: int(word[1:])) for words in kept)


def test_noise_seeds_differ_by_image_sample_epoch_and_seed():
    seeds = noise_seeds(0, 0, 5, 3)
    assert seeds == noise_seeds(0, 0, 5, 3)
    assert noise_seeds(0, 0, 5, 2) == seeds[:2]
    others = [noise_seeds(1, 0, 5, 3), noise_seeds(0, 1, 5, 3), noise_seeds(0, 0, 6, 3)]
    assert len({seed for group in (seeds, *others) for seed in group}) == 12
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_options_are_checked():
    with pytest.raises(ValueError, match=r"source is 'captoin'\. Use one of \('none', 'question', "):
        PromptOptions("captoin")
    with pytest.raises(ValueError, match=r"dropout is 30\. Use a value in \[0, 1\]\."):
        PromptOptions(dropout=30)
    with pytest.raises(ValueError, match="source is 'caption', to which pseudo-captions cannot be appended"):
        PromptOptions("caption", pseudo_captions={})


def test_pseudo_captions_from_a_file(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"a.png": "a cat"}))
    (tmp_path / "a.jsonl").write_text('{"image": "a.png", "caption": "a cat"}\n')
    assert read_pseudo_captions(tmp_path / "a.json") == read_pseudo_captions(tmp_path / "a.jsonl") == {"a.png": "a cat"}
    (tmp_path / "b.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"b\.json' does not hold captions"):
        read_pseudo_captions(tmp_path / "b.json")
    with pytest.raises(RecordError, match=r"the image 'b\.png', for which there is no pseudo-caption"):
        training_prompts(record(), PromptOptions(pseudo_captions={"a.png": "x"}), 0, 0, 0)
