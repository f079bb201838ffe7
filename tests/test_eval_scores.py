"""Formulas and parsers of the benchmarks, against published numbers, known answerers and simulation."""

import itertools
import json
import random
from pathlib import Path

import pytest

from sdllava.evaluation.benchmarks import blink, llava_bench, mmvp, naturalbench, winoground
from sdllava.evaluation.benchmarks.matching_base import MatchingItem, picks_both_images, winoground_verdicts
from sdllava.evaluation.benchmarks.mmvp_vlm import MMVPVLM, PATTERNS
from sdllava.evaluation.published import MMVP_VLM, published_rows

BLINK_DATA = Path(__file__).parents[2] / "shared" / "data" / "blink"
needs_blink = pytest.mark.skipif(not BLINK_DATA.is_dir(), reason="the published BLINK files are not here")


@needs_blink
def test_blink_gives_the_published_llava_score():
    answers = json.loads((BLINK_DATA / "val_answers.json").read_text())
    predictions = json.loads((BLINK_DATA / "predictions_llava_v1.5_7b.json").read_text())
    scores = blink.score(predictions, answers)
    assert round(scores["macro"], 2) == 37.13
    assert round(scores["micro"], 2) == 36.35
    assert round(scores["tasks"]["Jigsaw"], 2) == 11.33
    assert set(scores["tasks"]) == set(blink.TASKS)


@needs_blink
def test_blink_parses_raw_replies_as_published():
    """The stored replies contain "<s>", so that the authors' script did not recognise bare letters and called GPT."""
    agreed = 0
    for path in sorted((BLINK_DATA / "raw_llava_v1.5_7b").glob("*.json")):
        for row in [row for split in json.loads(path.read_text()).values() for row in split]:
            option = blink.parse_option(row["full_prediction"], FEWER_CHOICES.get(path.stem, 4))
            if option is not None:
                agreed += 1
                assert option == row["prediction"], (path.stem, row["idx"])
    assert agreed == 2715  # of 3,807


FEWER_CHOICES = {
    "Art Style": 2,
    "Jigsaw": 2,
    "Multi-view Reasoning": 2,
    "Object Localization": 2,
    "Relative Depth": 2,
    "Relative Reflectance": 3,
    "Spatial Relation": 2,
    "Visual Similarity": 2,
}


@pytest.mark.parametrize(
    ("reply", "option"),
    [
        ("A", "(A)"),
        ("(B)", "(B)"),
        ("(B) two", "(B)"),
        ("The answer is (C) .", "(C)"),
        ("(A) or (B)\n\n(B) it is", "(B)"),
        ("(A) or (B)", None),
        ("A is closer", None),
        ("(D) is not among three", None),
        ("", None),
    ],
)
def test_blink_parser(reply, option):
    assert blink.parse_option(reply, 3) == option


def test_blink_refuses_predictions_without_answers():
    with pytest.raises(ValueError, match="val_Counting_9"):
        blink.score({"val_Counting_9": "(A)"}, {"val_Counting_1": "(A)"})
    with pytest.raises(ValueError, match="val_Counting_1"):
        blink.score({}, {"Counting1": "(A)"})


def test_blink_chance_of_the_published_sizes():
    sizes = [117, 120, 132, 130, 150, 150, 133, 122, 124, 134, 139, 143, 172, 135]
    choices = [2, 4, 4, 4, 4, 2, 2, 2, 2, 3, 4, 2, 4, 2]
    records = [
        {"id": f"{task}{i}", "task": task, "choices": ["x"] * count, "correct": False}
        for task, size, count in zip(blink.TASKS, sizes, choices, strict=True)
        for i in range(size)
    ]
    assert len(records) == 1901
    assert blink.BLINK().chance(records)["macro"] == pytest.approx(38.10, abs=0.01)


PATTERN_SCORES = {  # verdicts (q0i0, q0i1, q1i0, q1i1) -> Q, I, G by counting by hand
    (0, 0, 0, 0): (0, 0, 0),
    (1, 0, 0, 0): (0, 0, 0),
    (0, 1, 0, 0): (0, 0, 0),
    (0, 0, 1, 0): (0, 0, 0),
    (0, 0, 0, 1): (0, 0, 0),
    (1, 1, 0, 0): (50, 0, 0),
    (0, 0, 1, 1): (50, 0, 0),
    (1, 0, 1, 0): (0, 50, 0),
    (0, 1, 0, 1): (0, 50, 0),
    (1, 0, 0, 1): (0, 0, 0),
    (0, 1, 1, 0): (0, 0, 0),
    (1, 1, 1, 0): (50, 50, 0),
    (1, 1, 0, 1): (50, 50, 0),
    (1, 0, 1, 1): (50, 50, 0),
    (0, 1, 1, 1): (50, 50, 0),
    (1, 1, 1, 1): (100, 100, 100),
}


@pytest.mark.parametrize("verdicts", list(itertools.product((0, 1), repeat=4)))
def test_naturalbench_on_all_patterns(verdicts):
    q, i, g = PATTERN_SCORES[verdicts]
    assert naturalbench.score([verdicts]) == {"Acc": 25 * sum(verdicts), "Q_Acc": q, "I_Acc": i, "G_Acc": g}


@pytest.mark.parametrize("answer", [0, 1, -1])
def test_naturalbench_constant_answerer(answer):
    right = [(answer == truth) for truth in (1, 0, 0, 1)]
    expected = (
        {"Acc": 50, "Q_Acc": 0, "I_Acc": 0, "G_Acc": 0}
        if answer >= 0
        else dict.fromkeys(("Acc", "Q_Acc", "I_Acc", "G_Acc"), 0)
    )
    assert naturalbench.score([right] * 7) == expected


def test_chance_by_simulation():
    generator = random.Random(0)
    groups = [[generator.random() < 0.5 for _ in range(4)] for _ in range(20000)]
    simulated = naturalbench.score(groups)
    for key, value in naturalbench.NaturalBench().chance([]).items():
        assert simulated[key] == pytest.approx(value, abs=0.8)
    flat = [cell for group in groups for cell in group]
    for key, value in mmvp.MMVP().chance([]).items():
        assert mmvp.score(flat)[key] == pytest.approx(value, abs=0.8)
    matrices = [[[generator.random() for _ in range(2)] for _ in range(2)] for _ in range(30000)]
    for key, value in winoground.Winoground().chance().items():
        assert winoground.score(matrices)[key] == pytest.approx(value, abs=0.8)
    assert 100 * sum(map(picks_both_images, matrices)) / 30000 == pytest.approx(25, abs=0.8)


@pytest.mark.parametrize("verdicts", list(itertools.product((0, 1), repeat=4)))
def test_mmvp_on_all_patterns(verdicts):
    pairs = (verdicts[0] and verdicts[1]) + (verdicts[2] and verdicts[3])
    assert mmvp.score(verdicts) == {"pair_accuracy": 50 * pairs, "single_accuracy": 25 * sum(verdicts)}


def test_known_answerers():
    """Always A is right on one question of each MMVP pair; the perfect answerer has everything."""
    truth = ["A", "B"] * 150
    assert mmvp.score([answer == "A" for answer in truth]) == {"pair_accuracy": 0, "single_accuracy": 50}
    assert mmvp.score([True] * 300) == {"pair_accuracy": 100, "single_accuracy": 100}
    assert set(naturalbench.score([[True] * 4] * 9).values()) == {100}


def test_mmvp_needs_whole_pairs():
    with pytest.raises(ValueError, match="there are 3 verdicts"):
        mmvp.score([True, False, True])


@pytest.mark.parametrize("signs", list(itertools.product((-1, 1), repeat=4)))
def test_winoground_and_mmvp_vlm_on_all_patterns(signs):
    """The 16 orders of (s00 > s10, s11 > s01, s00 > s01, s11 > s10) that a 2x2 matrix can have."""
    text0, text1, image0, image1 = signs
    matrix = next(
        (
            m
            for values in itertools.product(range(4), repeat=4)
            for m in [[values[:2], values[2:]]]
            if (m[0][0] - m[1][0]) * text0 > 0
            and (m[1][1] - m[0][1]) * text1 > 0
            and (m[0][0] - m[0][1]) * image0 > 0
            and (m[1][1] - m[1][0]) * image1 > 0
        ),
        None,
    )
    if matrix is None:  # s00 > s10 > s11 > s01 > s00 and its mirror are circles
        assert signs in {(1, 1, -1, -1), (-1, -1, 1, 1)}
        return
    verdicts = winoground_verdicts(matrix)
    assert verdicts == {
        "text": text0 > 0 and text1 > 0,
        "image": image0 > 0 and image1 > 0,
        "group": min(signs) > 0,
    }
    assert picks_both_images(matrix) == verdicts["image"]


def test_ties():
    equal = [[1.0, 1.0], [1.0, 1.0]]
    assert winoground_verdicts(equal) == {"text": False, "image": False, "group": False}
    assert not picks_both_images(equal)
    assert picks_both_images([[2.0, 1.0], [1.0, 1.0]])  # a tie goes to image 2, as in the published script


def test_mmvp_vlm_scores_blocks_of_fifteen_and_perfect_is_100():
    items = [MatchingItem(str(k), (None, None), ("x", "y"), {"pattern": PATTERNS[k // 15]}) for k in range(135)]
    right, wrong = [[1, 0], [0, 1]], [[0, 1], [0, 1]]
    scores = MMVPVLM().score(items, [right] * 15 + [wrong] * 120)
    assert scores["average"] == pytest.approx(100 / 9)
    assert scores["Orientation and Direction"] == 100
    assert scores["Texts"] == 0
    assert MMVPVLM().score(items, [right] * 135)["average"] == 100
    assert winoground.score([right] * 3) == {"text": 100, "image": 100, "group": 100}


@pytest.mark.parametrize(
    ("reply", "kind", "answer"),
    [
        ("Yes", "yes_no", 1),
        ("no, yes", "yes_no", 0),
        ("I know nothing", "yes_no", -1),
        ("B", "multiple_choice", 0),
        ("a dog", "multiple_choice", 1),
        ("The option (b).", "multiple_choice", 0),
        ("", "multiple_choice", -1),
    ],
)
def test_naturalbench_extraction(reply, kind, answer):
    assert naturalbench.extract_answer(reply, kind) == answer


def test_naturalbench_unknown_type():
    with pytest.raises(ValueError, match="'mcq'"):
        naturalbench.extract_answer("A", "mcq")


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("A", "A"),
        ("(b)", "B"),
        ("B. no", "B"),
        ("The answer is (A)", "A"),
        ("Option b", "B"),
        ("it is", None),
        ("", None),
    ],
)
def test_mmvp_letters(reply, letter):
    assert mmvp.parse_letter(reply) == letter


@pytest.mark.parametrize(
    ("review", "ratings"),
    [
        ("8 7.5\nGood.", (8.0, 7.5)),
        ("8,7\nGood.", (8.0, 7.0)),
        ("8, 7\nGood.", (-1.0, -1.0)),  # two blanks in a row are three fields
        ("Assistant 1: 8\n", (-1.0, -1.0)),
        ("", (-1.0, -1.0)),
    ],
)
def test_llava_bench_reviews(review, ratings):
    assert llava_bench.parse_ratings(review) == ratings


def test_llava_bench_score_rounds_and_keeps_failures():
    assert llava_bench.score([(9, 6), (8, 5)]) == 64.7
    assert llava_bench.score([(9, 6), (-1, -1)]) == 62.5


def test_llava_bench_categories_are_rounded_like_the_script():
    rows = [("a", "conv", 9, 7), ("b", "conv", 8, 3), ("c", "detail", 9, 4), ("d", "complex", 9, 8)]
    records = [{"id": i, "category": c, "ratings": (r, x)} for i, c, r, x in rows]
    assert llava_bench.LLaVABench().score(records) == {
        "all": round(100 * 5.5 / 8.75, 1),
        "conv": round(100 * 5 / 8.5, 1),
        "detail": round(100 * 4 / 9, 1),
        "complex": round(100 * 8 / 9, 1),
    }


def test_published_rows_are_transcribed_consistently():
    """Printed averages follow from the printed cells, so a slip of the pen would show."""
    for row in published_rows("mmvp_vlm"):
        mean = sum(row.scores[name] for name in MMVP_VLM[:9]) / 9
        assert row.scores["average"] == pytest.approx(mean, abs=0.07), row
    totals = {row.model: row.scores["macro"] for row in published_rows("blink") if row.source == "S4 Table 7"}
    tasks = [row for row in published_rows("blink") if len(row.scores) == 14]
    assert len(tasks) == 7
    assert sum(tasks[0].scores.values()) / 14 == pytest.approx(totals["CLIP-LLaVA-v1.5-7B"], abs=0.005)
    assert sum(tasks[1].scores.values()) / 14 == pytest.approx(totals["DINO-LLaVA-v1.5-7B"], abs=0.006)
    assert set(tasks[0].scores) == set(blink.TASKS)
