"""Damaged and hostile checkpoints: one `CheckpointError` each that names file and fix, before memory is used."""

import contextlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from damaged_folders import Case, assert_one_documented_error_each
from safetensors.torch import load_file, save_file

from sdllava import SDLlavaForConditionalGeneration, SDLlavaProcessor
from sdllava.checkpoint_files import CheckpointError

pytestmark = pytest.mark.slow

WEIGHTS = "model.safetensors"
Damage = Callable[[Path], object]
MESSAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]

GARBAGE = {
    "empty": b"",
    "zeros": bytes(300),
    "text": b"not JSON at all",
    "utf-16": json.dumps({"model_type": "sdllava"}).encode("utf-16"),
    "latin-1": '{"model_type": "é"}'.encode("latin-1"),
    "deep": b"[" * 100_000,
    "list": b"[1, 2, 3]",
    "number": b"7",
}
"""Contents that no JSON file of a checkpoint can have."""


def with_content(name: str, data: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(data)


def edited(name: str, *path: str, value: object) -> Damage:
    """Replace a field of a JSON file."""

    def damage(folder: Path) -> None:
        document = json.loads((folder / name).read_text())
        target = document
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = value
        (folder / name).write_text(json.dumps(document))

    return damage


def truncated(share: float) -> Damage:
    return lambda folder: os.truncate(folder / WEIGHTS, int((folder / WEIGHTS).stat().st_size * share))


def forged(change: Callable[[dict], object]) -> Damage:
    """Change the header of the weights."""

    def damage(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return damage


def flipped(seed: int) -> Damage:
    """Replace three bytes of the header of the weights by bytes that JSON does not allow there."""

    def damage(folder: Path) -> None:
        data = bytearray((folder / WEIGHTS).read_bytes())
        for place in random.Random(seed).sample(range(8, 8 + int.from_bytes(data[:8], "little")), 3):
            data[place] = 0x01
        (folder / WEIGHTS).write_bytes(data)

    return damage


def sharded(change: Callable[[dict, Path], object]) -> Damage:
    """Split the weights into two shards with an index, and change them."""

    def damage(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        shards = {f"model-0000{i + 1}-of-00002.safetensors": sorted(weights)[i::2] for i in range(2)}
        for shard, names in shards.items():
            save_file({name: weights[name] for name in names}, folder / shard, metadata={"format": "pt"})
        index = {"weight_map": {name: shard for shard, names in shards.items() for name in names}}
        change(index, folder)
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return damage


def first(header: dict) -> dict:
    return next(entry for name, entry in header.items() if name != "__metadata__")


def damages() -> Iterator[tuple[str, Damage, str]]:
    """Name, damage, and the file or folder that the message names."""
    for share in (0, 1e-5, 1e-4, 0.001, 0.01, 0.05, 0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 0.95, 0.99, 0.9999):
        yield f"truncated {share}", truncated(share), WEIGHTS
    for seed in range(10):
        yield f"flipped {seed}", flipped(seed), WEIGHTS
    for number in (0, 7, 1 << 20, 1 << 40, (1 << 64) - 1):
        yield f"header of {number}", with_content(WEIGHTS, number.to_bytes(8, "little") + b'{"a": 1}'), WEIGHTS
    for name, data in GARBAGE.items():
        yield f"weights {name}", with_content(WEIGHTS, data), WEIGHTS
        yield f"config {name}", with_content("config.json", data), "config.json"
        yield f"processor {name}", with_content("processor_config.json", data), "processor_config.json"
        yield f"tokenizer {name}", with_content("tokenizer.json", data), "tokenizer.json"
        yield f"tokenizer config {name}", with_content("tokenizer_config.json", data), "tokenizer_config.json"
    headers: dict[str, Callable[[dict], object]] = {
        "negative shape": lambda header: first(header).update(shape=[-1, 4]),
        "huge shape": lambda header: first(header).update(shape=[1 << 40, 1 << 40]),
        "text shape": lambda header: first(header).update(shape="4"),
        "no shape": lambda header: first(header).pop("shape"),
        "no dtype": lambda header: first(header).pop("dtype"),
        "dtype of a list": lambda header: first(header).update(dtype=["F32"]),
        "wide dtype": lambda header: first(header).update(dtype="F64"),
        "offsets after the end": lambda header: first(header).update(data_offsets=[1 << 50, 1 << 51]),
        "offsets backwards": lambda header: first(header).update(data_offsets=[64, 0]),
        "one offset": lambda header: first(header).update(data_offsets=[0]),
        "entry of a number": lambda header: header.update(more=7),
        "tensors share bytes": lambda header: header.update(more=dict(first(header))),
        "tensor removed": lambda header: header.pop(next(name for name in header if name != "__metadata__")),
    }
    for name, change in headers.items():
        yield f"header with {name}", forged(change), WEIGHTS
    shards: dict[str, Callable[[dict, Path], object]] = {
        "missing shard": lambda index, folder: (folder / "model-00002-of-00002.safetensors").unlink(),
        "truncated shard": lambda index, folder: os.truncate(folder / "model-00002-of-00002.safetensors", 999),
        "shard outside": lambda index, folder: index["weight_map"].update(x="../model.safetensors"),
        "absolute shard": lambda index, folder: index["weight_map"].update(x="/etc/passwd"),
        "pickled shard": lambda index, folder: index["weight_map"].update(x="pytorch_model.bin"),
        "shard of a number": lambda index, folder: index["weight_map"].update(x=1),
        "no map": lambda index, folder: index.pop("weight_map"),
        "map of a list": lambda index, folder: index.update(weight_map=["a"]),
    }
    for name, shard_change in shards.items():
        yield name, sharded(shard_change), "model"
    parts = {"text_config": ("num_hidden_layers", "hidden_size", "vocab_size", "intermediate_size")}
    parts["vision_config"] = ("num_hidden_layers", "hidden_size", "intermediate_size")
    for part, fields in parts.items():
        for field in fields:
            for value in (100_000_000, -1, "many"):
                yield f"{part}.{field} {value}", edited("config.json", part, field, value=value), "config.json"
        yield f"{part} a number", edited("config.json", part, value=7), ""
        yield f"{part} of an unknown type", edited("config.json", part, "model_type", value="nothing"), ""
    yield "100,000 layers", edited("config.json", "text_config", "num_hidden_layers", value=100_000), "config.json"
    yield "other hidden size", edited("config.json", "text_config", "intermediate_size", value=72), ""
    unet = ("diffusion_config", "unet_config")
    yield "wide UNet", edited("config.json", *unet, "block_out_channels", value=[1 << 30] * 4), "config.json"
    yield "deep UNet", edited("config.json", *unet, "layers_per_block", value=1 << 30), "config.json"
    yield "UNet of text", edited("config.json", *unet, value="unet"), ""


def load(folder: Path) -> None:
    """What `sdllava ask` reads. Fails unless there is one documented exception."""
    SDLlavaForConditionalGeneration.from_pretrained(folder)
    processor = SDLlavaProcessor.from_pretrained(folder)
    processor.apply_chat_template(MESSAGES, tokenize=False)


def test_every_damage_is_one_documented_error_within_5_seconds_and_1_gb(composed, tmp_path):
    cases = list(damages())
    assert len(cases) >= 120
    load(composed)  # imports what loading needs

    def is_documented(file: str, message: str, folder: str) -> bool:
        is_named = folder in message and (file in message or file == "")
        return is_named and "Download or save it again" in message

    attempts = [
        Case(name, composed, damage, load, (CheckpointError,), partial(is_documented, file))
        for name, damage, file in cases
    ]
    assert_one_documented_error_each(attempts, tmp_path)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "processor_config.json"])
def test_code_in_the_folder_is_not_executed(composed, tmp_path, file):
    folder = shutil.copytree(composed, tmp_path / "model")
    marker = tmp_path / "executed"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    names = ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoTokenizer", "AutoProcessor")
    edited(file, "auto_map", value=dict.fromkeys(names, "evil.Evil"))(folder)
    with contextlib.suppress(CheckpointError):
        load(folder)
    assert not marker.exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{% for i in range(10 ** 12) %}{{ i }}{% endfor %}",
        "{% if %}",
        "{{ raise_exception('no') }}",
        "{{ messages[0].pop('role') }}",
    ],
)
def test_a_hostile_chat_template_raises(composed, tmp_path, template):
    folder = shutil.copytree(composed, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match="The chat template failed"):
        SDLlavaProcessor.from_pretrained(folder).apply_chat_template(MESSAGES, tokenize=False)
