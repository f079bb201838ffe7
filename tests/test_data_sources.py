"""Every source of samples gives the same records, and bad samples are named."""

import io
import json
import tarfile
from pathlib import Path

import datasets
import fsspec
import numpy as np
import PIL.Image
import pytest

from sdllava.data import sources
from sdllava.data.images import open_image, resolve_image
from sdllava.data.records import RecordError, sample_key, split_content, split_turns, to_record
from sdllava.data.sources import DataSource, load_data, row_features
from sdllava.image_loading import load_rgb


def llava(i: int, image: str | None = None, question: str = "<image>\nWhat is it?") -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": f"answer {i}"}]
    return {"id": i if i % 2 else f"s{i}", "conversations": turns} | ({"image": image} if image else {})


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(3):
        PIL.Image.new("RGB", (8, 6), (40 * i, 10, 20)).save(folder / f"{i}.png")
    return folder


def records(data) -> list[dict]:
    return [{key: row[key] for key in ("images", "messages", "supervised_from", "error")} for row in data]


def conversation(*contents: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def test_every_format_gives_the_same_record():
    expected = conversation("<image>\nWhat is it?", "A cat.")
    parts = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    rows = [
        {
            "image": "a.png",
            "conversations": [
                {"from": "human", "value": "What is it?\n<image>"},
                {"from": "gpt", "value": "A cat."},
            ],
        },
        {"images": ["a.png"], "messages": conversation("What is it?", "A cat.")},
        {
            "images": ["a.png"],
            "messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "A cat."}],
        },
        {"jpg": "a.png", "json": {"messages": conversation("<image>\nWhat is it?", "A cat.")}},
    ]
    found = [to_record(row) for row in rows]
    assert all(record["messages"] == expected and record["images"] == ["a.png"] for record in found)
    assert len({sample_key(record) for record in found}) == 1


def test_words_around_an_image_stay_apart():
    """LLaVA's own preprocessing removes only the marker."""
    text = "Which animal is this?\n<image>\nAnswer with one word."
    parts = [{"type": "text", "text": "Here it is:"}, {"type": "image"}, {"type": "text", "text": "What is it?"}]
    found = [
        to_record({"image": "a.png", "messages": conversation(content, "Cat.")})["messages"][0]["content"]
        for content in (text, parts)
    ]
    assert found == [
        "<image>\nWhich animal is this?\n\nAnswer with one word.",
        "<image>\nHere it is:\n\nWhat is it?",
    ]
    two = to_record({"images": ["a.png", "b.png"], "messages": conversation([parts[1], *parts], "Cats.")})
    assert split_content(two["messages"][0]["content"]) == [parts[1], *parts]


def test_of_prompt_and_completion_only_the_completion_is_supervised():
    row = {"prompt": conversation("one", "two", "three"), "completion": [{"role": "assistant", "content": "four"}]}
    record = to_record(row)
    assert record["supervised_from"] == 3
    assert [message["content"] for message in record["messages"]] == ["one", "two", "three", "four"]
    assert to_record({"prompt": "one", "completion": "two"})["messages"] == conversation("one", "two")


def test_a_leading_answer_is_dropped_as_llava_drops_it():
    turns = [{"from": "gpt", "value": "hello"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert to_record({"conversations": turns})["messages"] == conversation("q", "a")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "x"}, "has no `conversations`"),
        ({"messages": conversation("q")}, "1 turns"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}, "one of the assistant"),
        ({"images": ["a", "b"], "messages": conversation("<image> q", "a")}, "1 <image> markers in its turns and 2"),
        ({"messages": conversation("q <image>", "a")}, "1 <image> markers in its turns and 0 images"),
        ({"image": "a", "messages": conversation("q", "<image> a")}, "marker outside the user's turns"),
        ({"conversations": [{"from": "cat", "value": "q"}]}, "'from': 'human' or 'gpt'"),
        ({"messages": [{"role": "user", "content": 3}]}, "content is 3"),
        ({"messages": [{"role": "user", "content": ["q"]}]}, "the part 'q'; a part is"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "text": None}]}]}, "the part {'type': 'im"),
        ({"conversations": [{"from": [], "value": "q"}]}, "'from': 'human' or 'gpt'"),
        ({"conversations": "q"}, "'q' as `conversations`; it should be a list"),
        ({"messages": 5}, "5 as `messages`; it should be a list"),
        ({"prompt": 3, "completion": "a"}, "3 as `prompt`; it should be a list"),
        ({"image": 7, "messages": conversation("q", "a")}, "the image 7; an image is a path"),
        ({"image": {"x": 1}, "messages": conversation("q", "a")}, "the image {'x': 1}; an image is a path"),
    ],
)
def test_bad_rows_say_why(row, reason):
    with pytest.raises(RecordError, match=reason):
        to_record(row)


def test_split_content_and_turns():
    assert split_content("see <image>\nand <image> now") == [
        {"type": "text", "text": "see "},
        {"type": "image"},
        {"type": "text", "text": "and "},
        {"type": "image"},
        {"type": "text", "text": " now"},
    ]
    record = to_record(
        {"images": ["a", "b"], "messages": conversation("<image>\nq1", "a1", "q2", "a2", "<image>\nq3", "a3")}
    )
    turns = list(split_turns(record))
    assert [turn["supervised_from"] for turn in turns] == [1, 3, 5]
    assert [len(turn["messages"]) for turn in turns] == [2, 4, 6]
    assert [turn["images"] for turn in turns] == [["a"], ["a"], ["a", "b"]]


def write_sources(folder: Path, images: Path) -> dict[str, DataSource]:
    samples = [llava(0, "0.png"), llava(1, question="no image"), llava(2, "2.png")]
    (folder / "a.json").write_text(json.dumps(samples, indent=1))
    (folder / "a.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    rows = [
        {
            "images": [sample["image"]] if "image" in sample else [],
            "messages": conversation(*[turn["value"] for turn in sample["conversations"]]),
        }
        for sample in samples
    ]
    features = datasets.Features(
        {"images": datasets.List(datasets.Value("string")), "messages": row_features()["messages"]}
    )
    table = datasets.Dataset.from_list(rows, features=features)
    table.to_parquet(folder / "a.parquet")
    table.save_to_disk(folder / "arrow")
    paths = ["a.json", "a.jsonl", "a.parquet", "arrow"]
    return {path: DataSource(str(folder / path), image_folder=str(images)) for path in paths}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("path", ["a.json", "a.jsonl", "a.parquet", "arrow"])
def test_sources_agree_streamed_or_not(tmp_path, images, path, streaming):
    sources = write_sources(tmp_path, images)
    found = records(load_data([sources[path]], streaming=streaming))
    assert found == records(load_data([sources["a.json"]]))
    assert [len(row["images"]) for row in found] == [1, 0, 1]
    assert not any(row["error"] for row in found)


@pytest.mark.parametrize("streaming", [False, True])
def test_webdataset_shards_bring_their_images(tmp_path, images, streaming):
    with tarfile.open(tmp_path / "shard-0.tar", "w") as shard:
        for i in range(2):
            annotation = json.dumps({**llava(i, "coco/other.png"), "id": i}).encode()
            for suffix, content in (("png", (images / f"{i}.png").read_bytes()), ("json", annotation)):
                info = tarfile.TarInfo(f"{i:04}.{suffix}")
                info.size = len(content)
                shard.addfile(info, io.BytesIO(content))
    rows = list(load_data([DataSource(str(tmp_path / "shard-*.tar"))], streaming=streaming))
    assert [row["messages"][1]["content"] for row in rows] == ["answer 0", "answer 1"]
    assert open_image(rows[1]["images"][0], None).getpixel((0, 0)) == (40, 10, 20)


def test_image_columns_are_read_undecoded(tmp_path, images):
    content = (images / "1.png").read_bytes()
    rows = {"image": [{"bytes": content, "path": "1.png"}], "messages": [conversation("q", "a")]}
    features = datasets.Features({"image": datasets.Image(), "messages": row_features()["messages"]})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "b.parquet")
    row = next(iter(load_data([DataSource(str(tmp_path / "b.parquet"))])))
    assert np.array_equal(np.asarray(open_image(row["images"][0], None)), np.asarray(PIL.Image.open(images / "1.png")))


@pytest.mark.parametrize("streaming", [False, True])
def test_bad_samples_carry_file_and_line(tmp_path, streaming):
    lines = [json.dumps(llava(0, question="q")), "{broken", "", json.dumps({"id": 3})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    rows = list(load_data([DataSource(str(tmp_path / "a.jsonl"))], streaming=streaming))
    assert [row["name"].rpartition(":")[2] for row in rows] == ["1", "2", "4"]
    assert [bool(row["error"]) for row in rows] == [False, True, True]
    (tmp_path / "a.json").write_text(json.dumps([llava(0, question="q"), {"id": 3}], indent=2))
    rows = list(load_data([DataSource(str(tmp_path / "a.json"))], streaming=streaming))
    assert "no `conversations`" in rows[1]["error"]
    line, number = rows[1]["name"].rpartition(":")[2].split(" sample ")
    assert number == "1"
    assert (tmp_path / "a.json").read_text().splitlines()[int(line) - 1].strip() == "{"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1}', r"a\.json:1 is not a JSON array of samples: '{\"a\": 1}'\."),
        ('[{"a": 1}\n{"b"', r"a\.json:2 is not a JSON array"),
        ('[{"a": 1},\n{"b"]', r"a\.json:2 is not JSON: "),
        ("", r"a\.json:1 is not a JSON array"),
        ("[]", r"a\.json' does not hold any samples\."),
        ('[{"a": 1}]\n[{"b": 2}]', r"a\.json:2 continues after the array: '\[{\"b\": 2}\]'\. Write all samples in one"),
    ],
)
def test_a_broken_json_file_names_its_line(tmp_path, text, reason):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=reason):
        load_data([DataSource(str(tmp_path / "a.json"))])


@pytest.mark.parametrize("streaming", [False, True])
def test_missing_files_are_named(tmp_path, streaming):
    with pytest.raises(FileNotFoundError, match=r"There is no data file '.*b\.json'\."):
        load_data([DataSource(str(tmp_path / "b.json"))], streaming=streaming)


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ((), r"There is no training data\. Name at least one source"),
        ((1.0, None), r"the weights \[1\.0, None\]\. Give every source a weight, or none\."),
        ((1.0, 0.0), r"the weights \[1\.0, 0\.0\]\. Use weights above 0\."),
    ],
)
def test_unusable_sources_say_why(weights, reason):
    with pytest.raises(ValueError, match=reason):
        load_data([DataSource("a.json", weight=weight) for weight in weights])


def test_mixtures_follow_their_weights_streamed_or_not(tmp_path):
    for name, count in (("a", 120), ("b", 24)):
        (tmp_path / f"{name}.json").write_text(json.dumps([llava(i, question=f"{name}?") for i in range(count)]))
    sources = [DataSource(str(tmp_path / f"{name}.json"), weight=weight) for name, weight in (("a", 3), ("b", 1))]
    mixed = [row["messages"][0]["content"] + row["messages"][1]["content"] for row in load_data(sources, seed=5)]
    streamed = load_data(sources, streaming=True, seed=5)
    assert [row["messages"][0]["content"] + row["messages"][1]["content"] for row in streamed] == mixed
    assert len(set(mixed)) == 144
    share = np.mean([sample.startswith("b") for sample in mixed])
    assert abs(share - 0.25) < 4 * np.sqrt(0.25 * 0.75 / len(mixed))
    plain = load_data([DataSource(source.path) for source in sources])
    assert [row["messages"][0]["content"] for row in plain] == ["a?"] * 120 + ["b?"] * 24


@pytest.mark.parametrize("streaming", [False, True])
def test_one_record_per_turn(tmp_path, streaming):
    turns = [("human", "q1"), ("gpt", "a1"), ("human", "q2"), ("gpt", "a2")]
    sample = {"conversations": [{"from": role, "value": value} for role, value in turns]}
    (tmp_path / "a.json").write_text(json.dumps([sample, {"id": 1}, llava(5, question="q")]))
    rows = list(load_data([DataSource(str(tmp_path / "a.json"))], streaming=streaming, one_record_per_turn=True))
    assert [(len(row["messages"]), row["supervised_from"]) for row in rows] == [(2, 1), (4, 3), (0, 0), (2, 1)]


def test_streams_are_shuffled_by_their_seed(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([llava(i, question="q") for i in range(50)]))

    def order(seed):
        data = load_data([DataSource(str(tmp_path / "a.json"))], streaming=True, shuffle_buffer=20, seed=seed)
        return [row["messages"][1]["content"] for row in data]

    assert order(1) == order(1) != order(2)
    assert sorted(order(1)) == sorted(order(2))


@pytest.mark.parametrize("path", ["../secret.png", "/etc/hostname", "link.png", "http://host/a.png", "link/secret.png"])
def test_image_paths_never_leave_the_folder(tmp_path, images, path):
    PIL.Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    (images / "link.png").symlink_to(tmp_path / "secret.png")
    (images / "link").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(RecordError, match="is outside the image folder"):
        open_image(path, str(images))


def test_remote_image_folders():
    assert resolve_image("a/b.png", "s3://bucket/images") == "s3://bucket/images/a/b.png"
    for path in ("../b.png", "/b.png", "s3://other/b.png"):
        with pytest.raises(RecordError, match="is outside the image folder 's3://bucket/images'"):
            resolve_image(path, "s3://bucket/images")


@pytest.mark.parametrize("streaming", [False, True])
def test_files_and_images_at_an_address(images, streaming):
    with fsspec.open("memory://bucket/a.jsonl", "wt") as stream:
        stream.write(json.dumps(llava(0, "sub/1.png")))
    with fsspec.open("memory://bucket/images/sub/1.png", "wb") as stream:
        stream.write((images / "1.png").read_bytes())
    source = DataSource("memory://bucket/a.jsonl", image_folder="memory://bucket/images")
    (row,) = load_data([source], streaming=streaming)
    assert open_image(row["images"][0], row["folder"]).getpixel((0, 0)) == (40, 10, 20)


def test_unreadable_images_say_so(images):
    (images / "bad.png").write_bytes(b"no image")
    with pytest.raises(RecordError, match=r"cannot be read, 'bad\.png': "):
        open_image("bad.png", str(images))
    with pytest.raises(RecordError, match="has an image that cannot be read: "):
        open_image({"bytes": b"no image", "path": None}, None)
    with pytest.raises(RecordError, match=r"'none\.png', which is not in the image folder"):
        open_image("none.png", str(images))
    for name in ("a\0.png", "a" * 400 + ".png"):
        with pytest.raises(RecordError, match="which cannot be opened"):
            open_image(name, str(images))
    with pytest.raises(RecordError, match="set `image_folder`"):
        open_image({"bytes": None, "path": "0.png"}, None)


def test_a_mistyped_path_is_not_looked_up_on_the_hub():
    with pytest.raises(FileNotFoundError, match=r"no data at '\./own_dta'\. Give an existing file or folder"):
        list(load_data([DataSource("./own_dta")]))


@pytest.mark.parametrize(
    ("source", "name", "revision"),
    [
        (DataSource("owner/name", "config", "validation"), "owner/name", None),
        (DataSource("owner/name", "config", "validation", "v1"), "owner/name", "v1"),
        (DataSource("owner/name@v2", "config", "validation"), "owner/name", "v2"),
        (DataSource("s3://bucket@x/name", "config", "validation"), "s3://bucket@x/name", None),
    ],
)
def test_repositories_are_loaded_at_their_revision(source, name, revision, monkeypatch):
    def load(*arguments, **options):
        assert arguments == (name, "config")
        assert options == {"split": "validation", "revision": revision, "streaming": False}
        return datasets.Dataset.from_list([{"messages": conversation("q", "a")}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    (row,) = load_data([source])
    assert row["messages"] == conversation("q", "a")


@pytest.mark.parametrize("given", ["path", "bytes", "opened"])
def test_a_transparent_image_has_the_pixels_that_answering_reads(images, given):
    """Half-covered red on white, wherever the record holds the image."""
    file = images / "clear.png"
    PIL.Image.new("RGBA", (8, 6), (200, 0, 0, 128)).save(file)
    image = {"path": "clear.png", "bytes": {"bytes": file.read_bytes()}, "opened": PIL.Image.open(file)}[given]
    opened = open_image(image, str(images))
    assert opened.mode == "RGB"
    assert np.array_equal(np.asarray(opened), np.asarray(load_rgb(file)))
    assert opened.getpixel((0, 0)) == (227, 127, 127)


def test_images_are_upright(images):
    turned = PIL.Image.new("RGB", (8, 6), (10, 20, 30))
    exif = turned.getexif()
    exif[0x0112] = 6  # a quarter turn
    turned.save(images / "turned.jpg", exif=exif)
    assert open_image("turned.jpg", str(images)).size == (6, 8)


def test_a_json_file_is_converted_once_to_memory_mapped_arrow(tmp_path, images):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([llava(i, "0.png") for i in range(3)]))

    def arrow_file() -> tuple[str, int]:
        (file,) = sources._json_table(str(path), str(images)).cache_files
        return file["filename"], Path(file["filename"]).stat().st_mtime_ns

    first = arrow_file()
    assert arrow_file() == first
    path.write_text(json.dumps([llava(i, "1.png") for i in range(4)]))
    assert arrow_file()[0] != first[0]
    assert len(load_data([DataSource(str(path), image_folder=str(images))])) == 4
