"""Damaged and hostile parts given to `sdllava compose`: one documented error each that names file or folder and fix."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from conftest import TOWER
from damaged_folders import Case, assert_one_documented_error_each
from test_checkpoints import GARBAGE, Damage, edited, first, forged, with_content

from sdllava import SDLlavaForConditionalGeneration, SDLlavaProcessor
from sdllava.backbones import read_published, read_whole
from sdllava.checkpoint_files import CheckpointError
from sdllava.parts import Parts, read_llava_parts, read_parts

pytestmark = pytest.mark.slow

WEIGHTS = {
    "llm": ("model.safetensors",),
    "clip": ("model.safetensors",),
    "llava": ("model.safetensors",),
    "sd2": ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"),
}
CONFIGURATIONS = {
    "llm": ("config.json", "tokenizer.json", "tokenizer_config.json"),
    "clip": ("config.json", "preprocessor_config.json"),
    "llava": ("config.json", "processor_config.json"),
    "sd2": ("unet/config.json", "vae/config.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer.json"),
}
NUMBERS = {
    "llm": ("config.json", ("num_hidden_layers", "hidden_size", "vocab_size", "intermediate_size")),
    "clip": ("config.json", ("num_hidden_layers", "hidden_size", "patch_size")),
    "sd2": ("unet/config.json", ("block_out_channels", "layers_per_block", "cross_attention_dim")),
}
OTHERS = (
    ("clip", "preprocessor_config.json", "crop_size", 100_000_000),
    ("clip", "preprocessor_config.json", "crop_size", {"height": "many", "width": 3}),
    ("clip", "preprocessor_config.json", "image_mean", {}),
    ("sd2", "unet/config.json", "down_block_types", 0),
    ("sd2", "vae/config.json", "scaling_factor", [1]),
    ("sd2", "scheduler/scheduler_config.json", "num_train_timesteps", -1),
    ("sd2", "scheduler/scheduler_config.json", "beta_start", "low"),
)


def truncated(name: str, share: float) -> Damage:
    return lambda folder: os.truncate(folder / name, int((folder / name).stat().st_size * share))


def damages() -> Iterator[tuple[str, str, Damage]]:
    """Part, name of the damage, damage."""
    for part, files in WEIGHTS.items():
        for file in files:
            for share in (0, 0.001, 0.5, 0.9999):
                yield part, f"{file} truncated to {share}", truncated(file, share)
            yield part, f"{file} missing", lambda folder, file=file: (folder / file).unlink()
            yield part, f"{file} of zeros", with_content(file, bytes(300))
    for part, files in CONFIGURATIONS.items():
        for file in files:
            yield part, f"{file} missing", lambda folder, file=file: (folder / file).unlink()
            for name, data in GARBAGE.items():
                yield part, f"{file} {name}", with_content(file, data)
    for part, (file, fields) in NUMBERS.items():
        for field in fields:
            for value in (100_000_000, -1, "many"):
                yield part, f"{field} {value}", edited(file, field, value=value)
    for part, file, field, value in OTHERS:
        yield part, f"{field} {value}", edited(file, field, value=value)
    yield "llm", "negative shape", forged(lambda header: first(header).update(shape=[-1, 4]))
    yield "llava", "huge shape", forged(lambda header: first(header).update(shape=[1 << 40, 1 << 40]))
    yield "clip", "no dtype", forged(lambda header: first(header).pop("dtype"))


def read(published: dict[str, Path], part: str, folder: Path) -> Parts:
    """The parts that `sdllava compose` reads, one of them from a folder of its own."""
    used = {**published, part: folder}
    tower = {"diffusion": str(used["sd2"]), **TOWER, "fusion_num_attention_heads": 4}
    if part == "llava":
        return read_llava_parts(str(used["llava"]), **tower)
    return read_parts(vision=str(used["clip"]), language_model=str(used["llm"]), **tower)


def compose(published: dict[str, Path], part: str, folder: Path) -> None:
    """What `sdllava compose` does. Fails unless there is one documented exception."""
    parts = read(published, part, folder)
    SDLlavaForConditionalGeneration.from_parts(parts)
    SDLlavaProcessor.from_parts(parts)


OPTIONAL = (
    "llm tokenizer_config.json missing",
    "llava processor_config.json missing",
    "sd2 tokenizer/tokenizer.json missing",
)
"""Damages that older repositories have by design."""


def test_every_damaged_part_is_one_documented_error_within_5_seconds_and_1_gb(published, tmp_path):
    cases = [case for case in damages() if f"{case[0]} {case[1]}" not in OPTIONAL]
    assert len(cases) >= 120
    for part in ("llm", "llava"):
        compose(published, part, published[part])  # imports what reading needs

    def is_documented(message: str, folder: str) -> bool:
        has_fix = "Download or save it again" in message or "does not have the published layout" in message
        return folder in message and has_fix

    errors = (OSError, ValueError)
    attempts = [
        Case(f"{part} {name}", published[part], damage, partial(compose, published, part), errors, is_documented)
        for part, name, damage in cases
    ]
    assert_one_documented_error_each(attempts, tmp_path)


@pytest.mark.parametrize(
    ("file", "name", "value"), [case[1:] for case in OTHERS if case[0] == "sd2" and case[1] != "unet/config.json"]
)
def test_a_whole_diffusion_model_is_checked_as_one_that_is_cut(published, tmp_path, file, name, value):
    folder = Path(shutil.copytree(published["sd2"], tmp_path / "sd2"))
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(config | {name: value}))
    messages = []
    for read_diffusion in (read_published, read_whole):
        with pytest.raises(CheckpointError) as raised:
            read_diffusion(str(folder))
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize(
    ("part", "file"),
    [
        ("llm", "config.json"),
        ("llm", "tokenizer_config.json"),
        ("clip", "config.json"),
        ("clip", "preprocessor_config.json"),
        ("llava", "config.json"),
        ("sd2", "unet/config.json"),
        ("sd2", "model_index.json"),
    ],
)
def test_code_of_a_part_is_not_executed(published, tmp_path, monkeypatch, part, file):
    folder, marker = shutil.copytree(published[part], tmp_path / "part"), tmp_path / "executed"
    for place in (folder, folder / Path(file).parent):
        (place / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer", "AutoImageProcessor", "AutoProcessor")
    fields = {"auto_map": dict.fromkeys(names, "evil.Evil"), "model_type": "evil", "unet": ["evil", "Evil"]}
    fields |= dict.fromkeys(("_class_name", "tokenizer_class", "image_processor_type"), "evil.Evil")
    for field, value in fields.items():
        edited(file, field, value=value)(folder)
    monkeypatch.setattr("builtins.input", lambda *prompt: pytest.fail("A question on the terminal"))
    with contextlib.suppress(OSError, ValueError):
        compose(published, part, folder)
    assert not marker.exists()
