"""Damaged training data: reported by file and line, or as one documented error that names the file."""

import json
import random

import pytest

pytest.importorskip("datasets", reason="the extra train is not installed")
from sdllava.data.images import resolve_image
from sdllava.data.records import RecordError, to_record
from sdllava.data.sources import DataSource, load_data

GOOD = {"image": "a.png", "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat."}]}


def load(path, streaming=False) -> list[dict]:
    return list(load_data([DataSource(str(path))], streaming=streaming))


BAD_LINES = {
    "latin-1": ('{"image": "é"}'.encode("latin-1"), "the line is not UTF-8"),
    "utf-16": (json.dumps(GOOD).encode("utf-16").replace(b"\n", b""), "the line is not UTF-8"),
    "deep": (b"[" * 100_000, "is nested too deeply"),
    "surrogate": (json.dumps({**GOOD, "image": "\ud800.png"}).encode(), "has a text with a surrogate"),
    "surrogate-text": (json.dumps(GOOD).replace("A cat", "\\udfff").encode(), "has a text with a surrogate"),
    "surrogate-row": (b'"\\ud800"', "is not a JSON object"),
    "half-a-record": (b'{"supervised_from": 1, "messages": []}', "has `supervised_from` but not name"),
    "record-of-texts": (
        b'{"supervised_from": "x", "messages": 1, "images": 2, "name": 3, "folder": 4}', "as `supervised_from`"
    ),
    "truncated": (b'{"image": "a.png"', "Expecting"),
}  # fmt: skip


@pytest.mark.parametrize("streaming", [False, True])
def test_bad_lines_are_reported_by_file_and_line(tmp_path, streaming):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n".join([json.dumps(GOOD).encode(), *(line for line, _ in BAD_LINES.values())]))
    rows = load(path, streaming)
    assert [row["name"] for row in rows] == [f"{path}:{number}" for number in range(1, len(rows) + 1)]
    assert rows[0]["error"] == ""
    for row, (_, message) in zip(rows[1:], BAD_LINES.values(), strict=True):
        assert message in row["error"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.json", json.dumps([GOOD]).encode("utf-16"), r"a\.json:1 is not UTF-8"),
        ("b.json", b'[\n{"image": "\xe9"}]', r"b\.json:2 is not UTF-8"),
        ("c.json", b"[\n" + b"[" * 100_000, r"c\.json:\d is nested too deeply"),
        ("d.parquet", b"PAR1rubbishPAR1", r"d\.parquet' cannot be read"),
        ("e.arrow", b"rubbish" * 9, r"e\.arrow' cannot be read"),
        ("f.tar", b"rubbish" * 99, r"f\.tar' cannot be read"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / name)


def test_a_byte_order_mark_is_skipped(tmp_path):
    for name, data in (("a.json", [GOOD]), ("b.jsonl", GOOD)):
        (tmp_path / name).write_text(json.dumps(data), encoding="utf-8-sig")
        assert [row["error"] for row in load(tmp_path / name)] == [""]


def test_links_in_a_loop_and_out_of_the_folder_are_reported(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "out").symlink_to(tmp_path)
    with pytest.raises(RecordError, match="which cannot be opened"):
        resolve_image("loop/a.png", str(folder))
    with pytest.raises(RecordError, match="is outside the image folder"):
        resolve_image("out/a.png", str(folder))
    with pytest.raises(RecordError, match="which cannot be opened"):
        resolve_image("a\0.png", str(folder))


VALUES = (None, True, 0, -1, 2.5, "", "text", "\ud800", [], [1], {}, {"a": 1}, [[]], [{"from": "gpt"}], b"", "<image>")


def mutated(source: random.Random) -> dict:
    """A row with one to three fields of other values, at any depth."""
    row = json.loads(
        json.dumps(source.choice([GOOD, {"messages": [{"role": "user", "content": "x"}] * 2, "images": []}]))
    )
    for _ in range(source.randint(1, 3)):
        target = row
        while isinstance(target, dict | list) and target and source.random() < 0.5:
            key = source.choice(list(target) if isinstance(target, dict) else range(len(target)))
            if not isinstance(target[key], dict | list):
                break
            target = target[key]
        if isinstance(target, list):
            target.append(source.choice(VALUES))
        else:
            fields = [*target, "image", "images", "supervised_from", "prompt", "completion", "json", "jpg"]
            target[source.choice(fields)] = source.choice(VALUES)
    return row


def test_1000_mutated_records_are_read_or_reported():
    source = random.Random(0)
    outcomes = {"read": 0, "reported": 0}
    for _ in range(1000):
        row = mutated(source)
        try:
            to_record(row)
            outcomes["read"] += 1
        except RecordError:
            outcomes["reported"] += 1
    assert outcomes["read"] > 50
    assert outcomes["reported"] > 500
