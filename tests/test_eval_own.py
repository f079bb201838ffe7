"""Own questions from a JSON Lines file: parsing, metrics by category, errors, and the command."""

import json

import pytest
from fixtures_evaluation import make_image
from test_eval_cli import run, stored

from sdllava.evaluation.benchmarks import get_benchmark
from sdllava.evaluation.benchmarks.own import normalise, parse_letter
from sdllava.evaluation.runner import make_record, summarise

ROWS = [
    {"image": "a.png", "question": "Which colour?", "answer": "Red", "category": "colour"},
    {"image": "b.png", "question": "Which colour?", "answer": ["blue", "navy"], "category": "colour"},
    {"image": ["a.png", "b.png"], "question": "Which is red?", "options": ["first", "second"], "answer": "first"},
    {"id": "x", "image": "b.png", "question": "How many?", "options": ["one", "two", "ten"], "answer": "B"},
]
REPLIES = ["red.", "It is navy blue.", "(A)", "ten"]


@pytest.fixture
def own_file(tmp_path):
    for name in ("a.png", "b.png"):
        make_image(0).save(tmp_path / name)
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n")
    return path


def test_metrics_by_category(own_file):
    benchmark = get_benchmark("own")
    samples = benchmark.read(own_file)
    assert [sample.id for sample in samples] == ["1", "2", "3", "x"]
    assert len(samples[2].images) == 2
    assert samples[3].prompt.splitlines()[:3] == ["How many?", "A. one", "B. two"]
    assert samples[3].question == "How many?"
    records = [make_record(benchmark, *pair, None) for pair in zip(samples, REPLIES, strict=True)]
    assert [record["parsed"] for record in records] == ["red", "it is navy blue", "A", "C"]
    summary = summarise(benchmark, records)
    assert summary["scores"] == {
        "exact": 50, "contains": 75, "letter": 50, "exact/colour": 50, "contains/colour": 100,
    }  # fmt: skip
    assert summary["chance"] == {"letter": pytest.approx((50 + 100 / 3) / 2)}
    low, high = summary["intervals_95"]["exact"]
    assert 0 <= low < 50 < high <= 100


def test_the_short_protocol_adds_the_instruction_of_llava(own_file):
    first, *_ = get_benchmark("own", "short").read(own_file)
    assert first.prompt == "Which colour?\nAnswer the question using a single word or phrase."


NUMBERS, COLOURS, ANIMALS, YES_NO = (
    ["one", "two", "three"], ["red", "green", "dark red"], ["cat", "dog"], ["yes", "no"],
)  # fmt: skip


@pytest.mark.parametrize(
    ("options", "letter", "replies"),
    [
        (NUMBERS, "B", ["B", "b", "B.", "b.", "(b)", "b)", "**B**", "`B`", "**B.** two", "Two!"]),
        (NUMBERS, "B", ["B. two", "B, two", "B two", "b two", "B, since A is red", "B\nThere are two.", "b\nTwo"]),
        (
            NUMBERS,
            "B",
            ["Answer: B", "Answer: b", "**Answer:** B", "The answer is B.", "The answer is B because of it"],
        ),
        (NUMBERS, "B", ["option B", "I choose option b.", "The correct option is B", "Answer: (b)", "Option B fits"]),
        (NUMBERS, "B", ["There are two.", "(B) because one is not a cup", "It is (B), not (A)", "not A, B"]),
        (
            NUMBERS,
            "B",
            ["Not (A), it is (B)", "Option A is wrong. Option B is right.", "option A fits, the answer is B"],
        ),
        (NUMBERS, "C", ["I think (C) fits", "The answer is C, not A"]),
        (
            NUMBERS,
            None,
            ["(b", "A dog", "D", "", "(A) is wrong", "(A) isn't it", "It's not (A).", "The answer is not A."],
        ),
        (
            NUMBERS,
            None,
            ["The wrong answer is (A)", "A, B", "A, B and C", "one or two", "It isn\u2019t two", "not two"],
        ),
        (
            NUMBERS,
            None,
            ["the answer is a red circle", "Answer: A red circle", "B or not B", "twofold", "two is wrong"],
        ),
        (ANIMALS, "A", ["A cat", "a cat", "It is a cat.", "The answer is a cat"]),
        (ANIMALS, "B", ["A dog", "It is a dog.", "the answer is a dog", "Answer: A dog"]),
        (COLOURS, "C", ["It is dark red.", "(C) dark red"]),
        (COLOURS, "A", ["It is red."]),
        (["3", "4"], "A", ["There are 3.", "3"]),
        (["3", "4"], None, ["There are 3.5", "13"]),
        (YES_NO, "A", ["Yes, there is."]),
        (YES_NO, "B", ["No, there isn't.", "There is no cup."]),
        (["right", "wrong"], "B", ["B. Wrong", "B wrong", "wrong"]),
        (["a", "b"], None, ["This is a picture"]),
        (["...", "b"], None, [""]),
    ],
)
def test_letters(options, letter, replies):
    assert {reply: parse_letter(reply, options) for reply in replies} == dict.fromkeys(replies, letter)


@pytest.mark.parametrize("reply", ["B", "(b)", "**B**", "Answer: B", "It is 4.", "4"])
def test_options_may_be_numbers_and_a_right_letter_also_contains_the_answer(own_file, reply):
    own_file.write_text(json.dumps({"image": "a.png", "question": "How many?", "options": [3, 4], "answer": 4}))
    benchmark = get_benchmark("own")
    (sample,) = benchmark.read(own_file)
    assert sample.target == "B"
    record = make_record(benchmark, sample, reply, None)
    assert summarise(benchmark, [record])["scores"] == {"exact": 100, "contains": 100, "letter": 100}


def test_normalised_text():
    assert normalise("  Two  Red\ncups. ") == "two red cups"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"image": "a.png", "question": "What?"}, "row 1, lacks 'answer'"),
        (["a.png"], "line 1, is not a JSON object"),
        ({"image": "a.png", "question": "?", "answer": "z", "options": ["z"] * 27}, "at most 26 texts"),
        ({"image": "a.png", "question": "?", "answer": "z", "options": {"A": "z"}}, "at most 26 texts"),
        ({"image": "a.png", "question": "?", "options": ["x", "y"], "answer": "z"}, r"'z', which is not one of"),
        ({"image": "a.png", "question": "?", "options": ["x", "y"], "answer": ["x", "y"]}, "row 1, .* Give one answer"),
        ({"image": "a.png", "question": "<image> What?", "answer": "z"}, "row 1, has '<image>' in its question"),
        ({"image": "a.png", "question": "?", "options": ["<image>"], "answer": "A"}, "row 1, has '<image>' in its"),
        ({"image": "../a.png", "question": "?", "answer": "z"}, "leads out of"),
        ({"image": "c.png", "question": "?", "answer": "z"}, "'c.png' is missing"),
    ],
)
def test_wrong_rows_raise(own_file, row, reason):
    own_file.write_text(json.dumps(row))
    with pytest.raises((ValueError, FileNotFoundError), match=reason):
        get_benchmark("own").read(own_file)
    own_file.write_text("\n".join([json.dumps(ROWS[3])] * 2))
    with pytest.raises(ValueError, match="the id 'x' twice"):
        get_benchmark("own").read(own_file)


@pytest.mark.usefixtures("few_tokens", "few_resamples")
def test_the_command_needs_no_benchmark_and_compares(composed, own_file, tmp_path):
    output = run("evaluate", "--model", composed, "--data", own_file, "--output", tmp_path / "r", "--blind")
    (folder,) = (tmp_path / "r").glob("*/own")
    results = stored(folder)
    assert set(results["scores"]) == {"exact", "contains", "letter", "exact/colour", "contains/colour"}
    assert set(results["intervals_95"]) == set(results["scores"]) == set(results["blind"]["scores"])
    assert "contains" in output
    assert "colour" in output
    assert "exact" in run("evaluate", "--compare", folder, folder / "blind")
    error = run("evaluate", "--model", composed, "--data", tmp_path / "none.jsonl", code=1)
    assert "is not a file" in error
