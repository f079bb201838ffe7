"""Mistakes in replies to SHAPES: their kind, and the shares by question."""

import json

import numpy as np
import pytest

from research.miniature.shapes_replies import analyse, described_cells, first_mistake, table
from research.miniature.shapes_scenes import explain

CELLS = [("red", "square"), None, None, None, None, None, None, None, None]
RIGHT = explain(CELLS, "is a square red")


@pytest.mark.parametrize(
    ("old", "new", "kind"),
    [
        ("", "", None),
        ("1 square 2 red", "1 circle 2 red", "question"),
        ("red square a1", "red circle a1", "contents"),
        ("nothing _c3", "nothing c3", "marks"),
        ("a1 yes", "_a1 no", "marks"),
        ("yes", "no", "answer"),
        (" yes", "", "answer"),
        ("yes", "yes yes", "answer"),
    ],
)
def test_the_kind_of_the_first_mistake(old, new, kind):
    assert RIGHT.startswith("1 square 2 red 2 red red square a1 nothing _a2")
    assert RIGHT.endswith("1 square red square a1 yes")
    assert first_mistake(RIGHT.replace(old, new) if old else RIGHT, RIGHT) == kind


def test_cells_that_a_reply_describes():
    assert described_cells(RIGHT) == ["red square", *["nothing"] * 8]
    assert described_cells("1 red 2 left 3 circle 3 circle blue circle a1 _a2 2") == ["blue circle", ""]
    assert described_cells("yes") == described_cells("") == []


def test_shares_by_question(tmp_path):
    pixels = np.zeros((3, 30, 30, 3), np.uint8)
    pixels[:, 1:9, 1:9] = (0, 0, 255)
    np.save(tmp_path / "test.input.npy", pixels)
    (tmp_path / "test.query_str.txt").write_text("is a square red\nis a square red\nis a circle red\n")
    (tmp_path / "test.output").write_text("true\ntrue\nfalse\n")
    replies = [RIGHT, RIGHT.replace("nothing _c3", "blue circle _c3"), "yes"]
    verdicts = [True, True, False]
    lines = [
        {"id": f"test-{k}", "reply": reply, "correct": correct}
        for k, (reply, correct) in enumerate(zip(replies, verdicts, strict=True))
    ]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = analyse(tmp_path, tmp_path)
    assert [question for question, _ in rows] == ["is a circle red", "is a square red", "all"]
    circle, square, everything = (shares for _, shares in rows)
    assert (circle["right"], circle["cells"], circle["question"]) == (0, 0, 100)
    assert square == pytest.approx(
        {"right": 100, "cells": 100 * 17 / 18, "exact": 50, "question": 0, "contents": 50, "marks": 0, "answer": 0}
    )
    assert everything["right"] == pytest.approx(200 / 3)
    assert table(rows).splitlines()[-1].startswith("| all | 66.7 | 63.0 | 33.3 | 33.3 | 33.3 | 0.0 |")
    (tmp_path / "samples.jsonl").write_text(json.dumps(lines[0] | {"id": "val-0"}) + "\n")
    with pytest.raises(ValueError, match="'val-0', which is none of SHAPES' test split"):
        analyse(tmp_path, tmp_path)
    with pytest.raises(FileNotFoundError, match="has no answers in samples"):
        analyse(tmp_path / "other", tmp_path)
