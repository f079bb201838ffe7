"""Damaged training data: reported by file and line, or as one documented error that names the file."""

import io
import json
import os
import random
import re
import shutil
import tarfile
from pathlib import Path

import pytest

pytest.importorskip("datasets", reason="the extra train is not installed")
from datasets import Dataset

from sdllava.data.images import open_image, resolve_image
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
    "long-number": (b'{"image": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
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
        ("c2.json", b'[\n{"image": ' + b"9" * 5000 + b"}]", r"c2\.json:2 is not JSON: Exceeds the limit"),
        ("d.parquet", b"PAR1rubbishPAR1", r"d\.parquet' cannot be read"),
        ("e.arrow", b"rubbish" * 9, r"e\.arrow' cannot be read"),
        ("f.tar", b"rubbish" * 99, r"f\.tar' cannot be read"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / name)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Samples in Parquet, Arrow and tar files, and as a folder of `save_to_disk`."""
    folder = tmp_path_factory.mktemp("saved")
    data = Dataset.from_list([{**GOOD, "padding": f"{number} " * 99} for number in range(300)])
    data.to_parquet(folder / "a.parquet", batch_size=100)
    data.save_to_disk(folder / "disk")
    shutil.copy(next((folder / "disk").glob("*.arrow")), folder / "a.arrow")
    with tarfile.open(folder / "a.tar", "w") as archive:
        for number in range(30):
            member = tarfile.TarInfo(f"{number:03}.json")
            member.size = len(text := json.dumps(GOOD).encode())
            archive.addfile(member, io.BytesIO(text))
    return folder


def overwritten(path: Path) -> None:
    """Replace a tenth of a file, after its middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + len(data) // 10] = bytes([255]) * (len(data) // 10)
    path.write_bytes(data)


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 6 // 10 - 100)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("damage", [truncated, overwritten])
@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.tar"])
def test_a_damaged_file_is_named_with_the_row_where_it_ends(saved, tmp_path, name, damage, streaming):
    path = shutil.copy(saved / name, tmp_path / name)
    damage(path)
    place = rf"{name}( row \d+)?'" if streaming else f"{name}'"
    with pytest.raises(ValueError, match=rf"The data '.*{place} cannot be read \(.+\)\. Give intact files\."):
        load(path, streaming)


@pytest.mark.parametrize("file", ["state.json", "dataset_info.json", "data-00000-of-00001.arrow"])
def test_a_damaged_folder_of_save_to_disk_is_named(saved, tmp_path, file):
    folder = shutil.copytree(saved / "disk", tmp_path / "data")
    truncated(folder / file)
    with pytest.raises(ValueError, match=r"The data '.*/data' cannot be read \(.+\)\. Give intact files\."):
        load(folder)


def test_shards_of_a_stream_are_read_in_order_and_named(saved, tmp_path):
    for number in range(2):
        shutil.copy(saved / "a.parquet", tmp_path / f"{number}.parquet")
    rows = load(tmp_path / "*.parquet", streaming=True)
    names = [row["name"] for row in rows]
    assert len(set(names)) == len(names) == 600
    assert names[0].endswith("*.parquet shard 0 row 0")
    assert {row["error"] for row in rows} == {""}


def test_code_in_a_folder_of_data_is_not_executed(tmp_path):
    folder, marker = tmp_path / "data", tmp_path / "executed"
    folder.mkdir()
    (folder / "data.py").write_text(f"open({str(marker)!r}, 'w')\n")
    with pytest.raises(ValueError, match=r"/data' cannot be read \(Dataset scripts are no longer supported"):
        load(folder)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.parquet", "a.arrow", "a.tar", "folder"])
def test_a_file_that_links_to_itself_is_named(tmp_path, name):
    (tmp_path / name).symlink_to(tmp_path / name)
    with pytest.raises((FileNotFoundError, ValueError), match=re.escape(str(tmp_path / name))):
        load(tmp_path / name)


def test_a_named_pipe_in_the_image_folder_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(RecordError, match=r"names the image 'a\.png', which is not in the image folder"):
        open_image("a.png", str(tmp_path))


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
