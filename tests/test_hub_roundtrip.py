"""Push to the loopback Hub and load in other processes with empty caches: bitwise equal results."""

import ast
import runpy
import subprocess
import sys
from pathlib import Path

import forks
import pytest
import yaml
from hub_clients import become_client
from loopback_hub import LoopbackHub

HERE = Path(__file__).parent

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub().running() as running:
        yield running


def run(hub, home: Path, *arguments, token: str | None = "hf_loopback") -> str:
    result = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**hub.environment(home, token), "PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
        timeout=300,
        cwd=home,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def fork(hub, home: Path, *arguments) -> None:
    """Run a script in a fork of this process, where `sdllava` is installed, with an empty cache."""

    def work() -> None:
        become_client(hub, home)
        sys.path[:0] = [str(HERE)]
        sys.argv = [str(argument) for argument in arguments]
        runpy.run_path(sys.argv[0], run_name="__main__")

    forks.run(work, home / "log")


@pytest.fixture(scope="module")
def pushed(hub, published, tmp_path_factory) -> Path:
    """The answers of the process that pushed a model in every way."""
    memory = tmp_path_factory.mktemp("memory")
    fork(hub, tmp_path_factory.mktemp("home"), HERE / "hub_push_script.py", published["sd2"].parent, memory)
    return memory


@pytest.fixture(scope="module")
def read(hub, pushed, tmp_path_factory) -> Path:
    """The same folder after a process without the package has loaded every repository."""
    run(hub, tmp_path_factory.mktemp("home"), HERE / "hub_read_script.py", pushed)
    return pushed


@pytest.fixture(scope="module")
def with_package(hub, pushed, tmp_path_factory) -> Path:
    """The folder of a process with the package, which answers and then trains."""
    home = tmp_path_factory.mktemp("home")
    fork(hub, home, HERE / "hub_package_script.py", pushed, home)
    return home


def test_without_the_package_logits_and_answers_are_bitwise_equal(read, hub):
    (said,) = ast.literal_eval((read / "pipeline.txt").read_text())
    assert said["answer"]
    assert 0 < said["score"] <= 1
    assert sum(name.startswith("model-0") for name in hub.files("tester/sharded")) > 2
    assert hub.repositories["tester/sharded"].private


def test_with_the_package_pipeline_and_adapter_answer_the_same(read, with_package):
    assert (with_package / "pipeline.txt").read_text() == (read / "pipeline.txt").read_text()


def test_an_adapter_is_pushed_as_an_adapter_of_its_base_model(pushed, hub):
    files = hub.files("tester/adapter")
    assert "adapter_model.safetensors" in files
    assert "model.safetensors" not in files
    card = yaml.safe_load(files["README.md"].decode().split("---")[1])
    assert card["base_model"] == ["tester/whole"]
    assert card["base_model_relation"] == "adapter"


def test_the_card_names_the_parts_with_their_commits_and_licences(pushed, hub):
    card = hub.files("tester/sharded")["README.md"].decode()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["base_model"] == ["tester/sd2", "tester/clip", "tester/llm"]
    assert metadata["language"] == ["en"]
    assert metadata["license"] == "other"
    assert "trial" in metadata["tags"]
    for name, licence in (("sd2", "openrail++"), ("clip", "mit"), ("llm", "mit")):
        commit = hub.repositories[f"tester/{name}"].refs["main"]
        assert f"| tester/{name} | {commit} | {licence} |" in card
    assert "OpenRAIL licence" in card


def test_parts_left_out_are_not_uploaded(pushed, hub):
    sizes = {name: len(hub.files(f"tester/{name}")["model.safetensors"]) for name in ("whole", "left-out")}
    assert sizes["left-out"] < sizes["whole"] / 10
    assert "not in this repository: diffusion, vision" in hub.files("tester/left-out")["README.md"].decode()
    assert "processor_config.json" in hub.files("tester/left-out")
    folder, model = hub.files("tester/folder-left-out"), hub.files("tester/left-out")
    assert {name for name in folder if folder[name] != model[name]} == {"README.md"}


def test_a_trainers_push(hub, with_package):
    messages = hub.repositories["tester/trained"].messages.values()
    pushes = ["Training in progress, step 1", "Training in progress, step 2", "End of training"]
    assert [message for message in messages if message != "initial commit"] == pushes
    files = hub.files("tester/trained")
    assert {"model.safetensors", "config.json", "processor_config.json", "training.json"} <= set(files)
    assert {"modeling_sdllava.py", "generation_config.json"} <= set(files)
    card = files["README.md"].decode()
    assert "## Training: finetune" in card
    assert "| optimizer steps | 2 |" in card
    assert "| data | colours.json |" in card
    assert "recipe.yaml" in files
    assert "training_args.bin" not in files
    assert not any(str(with_package).encode() in content for content in files.values())
