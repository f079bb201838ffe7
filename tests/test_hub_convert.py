"""`sdllava convert`: pickles become safetensors with the same tensors, and nothing else reads pickles."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from sdllava import SDLlavaForConditionalGeneration
from sdllava.commands.main import app
from sdllava.hub import convert as converting
from sdllava.hub.convert import convert, write_safetensors
from sdllava.repositories import require_safetensors
from sdllava.vision import load_vision


def pickle_weights(source: Path, folder: Path, shards: int = 1) -> dict[str, torch.Tensor]:
    """A copy of a published part whose weights are pickles, in the layout of transformers; returns its tensors."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (weights,) = source.glob("*.safetensors")
    tensors = load_file(weights)
    stem = weights.stem if weights.stem.startswith("diffusion") else "pytorch_model"
    if shards == 1:
        torch.save(tensors, folder / f"{stem}.bin")
        return tensors
    names = [f"{stem}-{i + 1:05}-of-{shards:05}.bin" for i in range(shards)]
    where = {name: names[i % shards] for i, name in enumerate(tensors)}
    for file in names:
        torch.save({name: tensor for name, tensor in tensors.items() if where[name] == file}, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / f"{stem}.bin.index.json").write_text(json.dumps(index))
    return tensors


@pytest.fixture
def in_this_process(monkeypatch):
    """Conversion without a second process, whose start costs seconds. One test below has it."""

    class Pool:
        def __init__(self, **_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def submit(self, function, *arguments):
            function(*arguments)
            return self

        def result(self):
            return None

    monkeypatch.setattr(converting, "ProcessPoolExecutor", Pool)


@pytest.mark.slow
def test_the_command_converts_in_another_process(published, tmp_path):
    tensors = pickle_weights(published["llm"], tmp_path / "pickled")
    (tmp_path / "pickled" / "flax_model.msgpack").write_bytes(b"other weights")
    result = CliRunner().invoke(app, ["convert", str(tmp_path / "pickled"), str(tmp_path / "new")])
    assert result.exit_code == 0, result.output
    assert "model.safetensors" in result.output
    written = load_file(tmp_path / "new" / "model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensors[name]) for name in tensors)
    kept = {path.name for path in published["llm"].iterdir()}
    assert {path.name for path in (tmp_path / "new").iterdir()} == kept
    with pytest.raises(FileExistsError, match=r"exists\. Name a new folder"):
        convert(str(tmp_path / "pickled"), tmp_path / "new")


@pytest.mark.usefixtures("in_this_process")
def test_shards_and_folders_of_a_pipeline_are_converted(published, tmp_path):
    tensors = pickle_weights(published["llm"], tmp_path / "pickled", shards=3)
    names = convert(str(tmp_path / "pickled"), tmp_path / "new")
    assert names == [f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "new", use_safetensors=True).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    pickle_weights(published["sd2"] / "unet", tmp_path / "sd" / "unet")
    shutil.copytree(published["sd2"] / "vae", tmp_path / "sd" / "vae")
    assert convert(str(tmp_path / "sd"), tmp_path / "new-sd") == ["unet/diffusion_pytorch_model.safetensors"]
    assert (tmp_path / "new-sd" / "vae" / "diffusion_pytorch_model.safetensors").is_file()
    with pytest.raises(ValueError, match=r"has no pickled weights without safetensors\. Use it"):
        convert(str(tmp_path / "new-sd"), tmp_path / "again")


class Command:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


@pytest.mark.parametrize("content", ["code", "noise", "list"])
@pytest.mark.usefixtures("in_this_process")
def test_a_pickle_with_more_than_tensors_raises_unexecuted(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "source"
    source.mkdir()
    file = source / "pytorch_model.bin"
    if content == "code":
        torch.save({"weight": Command()}, file)
    elif content == "noise":
        file.write_bytes(b"\x80\x02 no pickle")
    else:
        torch.save([torch.zeros(1)], file)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin'.*(more than tensors|tensors by name).*Ask its author"):
        convert(str(source), tmp_path / "new")
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "new").exists()


def test_shared_memory_is_written_twice(tmp_path):
    shared = torch.arange(4.0)
    torch.save({"a": shared, "b": shared[1:]}, tmp_path / "pytorch_model.bin")
    write_safetensors(str(tmp_path / "pytorch_model.bin"), str(tmp_path / "model.safetensors"))
    written = load_file(tmp_path / "model.safetensors")
    assert written["a"].tolist() == [0, 1, 2, 3]
    assert written["b"].tolist() == [1, 2, 3]


@pytest.mark.parametrize("part", ["llm", "clip", "llava"])
def test_parts_with_pickles_only_raise_with_the_converter(published, tmp_path, part):
    pickled = str(tmp_path / "pickled")
    pickle_weights(published[part], Path(pickled))
    model = SDLlavaForConditionalGeneration
    load = {
        "llm": lambda: model.from_component_pretrained(vision=str(published["clip"]), language_model=pickled),
        "clip": lambda: load_vision(pickled, tiny.vision_config(), torch.float32),
        "llava": lambda: model.from_llava_pretrained(pickled),
    }
    with pytest.raises(ValueError, match=r"pytorch_model\.bin, a pickle.*Run `sdllava convert .*pickled FOLDER`"):
        load[part]()


@pytest.mark.parametrize(
    "pickle", ["pytorch_model.bin", "pytorch_model.bin.index.json", "unet/diffusion_pytorch_model.bin"]
)
def test_a_repository_with_pickles_only_raises(monkeypatch, pickle):
    held = {pickle}
    monkeypatch.setattr("sdllava.repositories.has_file", lambda source, name, **_: name in held)
    with pytest.raises(ValueError, match=r"Run `sdllava convert lmsys/vicuna-7b-v1\.5 FOLDER`"):
        require_safetensors("lmsys/vicuna-7b-v1.5")
    held.add("model.safetensors.index.json")
    require_safetensors("lmsys/vicuna-7b-v1.5@main")
