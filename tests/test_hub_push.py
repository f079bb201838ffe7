"""Pushing a folder to the loopback Hub: what is uploaded, where, and what happens after an interruption."""

import copy
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import forks
import pytest
from hub_clients import become_client, run_command
from loopback_hub import LoopbackHub
from safetensors.torch import load_file, save_file

from sdllava.hub.push import collect, push_folder
from sdllava.remote_code import travelling_files

EARLIER = Path(__file__).parent / "data" / "earlier-version"


@pytest.fixture
def hub():
    with LoopbackHub().running() as running:
        yield running


@pytest.fixture(scope="module")
def state_after_a_push(tmp_path_factory) -> tuple:
    """The repositories and large files of a Hub after a push of `EARLIER` to tester/model."""
    with LoopbackHub().running() as running:
        assert run_push(running, tmp_path_factory.mktemp("home"), EARLIER, "tester/model").returncode == 0
        return running.repositories, running.large_files


@pytest.fixture
def pushed(hub, state_after_a_push) -> LoopbackHub:
    """A Hub with `EARLIER` in tester/model."""
    hub.repositories, hub.large_files = copy.deepcopy(state_after_a_push)
    return hub


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A sharded checkpoint in a run's folder, with files that must not be pushed."""
    folder = Path(shutil.copytree(EARLIER, tmp_path / "run"))
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for shard, kept in shards.items():
        save_file({name: weights[name] for name in kept}, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: shard for shard, kept in shards.items() for name in kept}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "checkpoint-4").mkdir()
    shutil.copy(EARLIER / "model.safetensors", folder / "checkpoint-4")
    for name in ("optimizer.pt", "training_args.bin", "run.json", "modeling_sdllava.py", "notes.txt"):
        (folder / name).write_text("private")
    return folder


ADDED = ("README.md", "handler.py", "requirements.txt")
"""What a push makes, in addition to the checkpoint and its code."""


def run_push(hub, home: Path, *arguments, token: str | None = "hf_loopback") -> subprocess.CompletedProcess:
    return run_command(hub, home, "push", *arguments, token=token)


def digest(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_push_uploads_the_checkpoint_bitwise_and_nothing_else(hub, checkpoint, tmp_path):
    before = digest(checkpoint)
    result = run_push(hub, tmp_path / "home", checkpoint, "tester/model", "--private", "--message", "First")
    assert result.returncode == 0, result.stderr
    repository = hub.repositories["tester/model"]
    assert result.stdout.strip() == f"{hub.endpoint}/tester/model/commit/{repository.refs['main']}"
    assert repository.private
    assert repository.messages[repository.refs["main"]] == "First"
    files = hub.files("tester/model")
    kept = [name for name in before if not name.startswith(("checkpoint-4", "optimizer", "training_args", "run.json"))]
    kept = [name for name in kept if name not in ("notes.txt", "modeling_sdllava.py", "expected.json")]
    assert set(files) == {*kept, *(path.name for path in travelling_files()), *ADDED}
    assert {name: hashlib.sha256(files[name]).hexdigest() for name in kept} == {name: before[name] for name in kept}
    code = Path(__file__).parents[1] / "sdllava" / "modeling_sdllava.py"
    assert files["modeling_sdllava.py"] == code.read_bytes()
    assert b'model="tester/model"' in files["README.md"]
    assert digest(checkpoint) == before


def test_branches_and_pull_requests(hub, tmp_path):
    assert run_push(hub, tmp_path, EARLIER, "tester/model", "--revision", "trial").returncode == 0
    repository = hub.repositories["tester/model"]
    assert hub.files("tester/model", "main") == {}
    assert "config.json" in hub.files("tester/model", "trial")
    result = run_push(hub, tmp_path, EARLIER, "tester/model", "--pull-request")
    assert result.stdout.strip() == f"{hub.endpoint}/tester/model/discussions/1"
    assert hub.files("tester/model", "main") == {}
    assert "config.json" in hub.files("tester/model", "refs/pr/1")
    assert not repository.private


def test_a_dry_run_lists_files_sizes_and_the_card_and_sends_nothing(hub, tmp_path):
    result = run_push(hub, tmp_path, EARLIER, "tester/model", "--dry-run", token=None)
    assert result.returncode == 0, result.stderr
    assert "       115,880  model.safetensors\n" in result.stdout
    assert "pipeline_tag: visual-question-answering" in result.stdout
    assert "## How to use" in result.stdout
    assert not any("tester" in request or "create" in request for request in hub.requests)


def test_an_invalid_name_is_reported_before_anything_is_written(hub, tmp_path):
    result = run_push(hub, tmp_path, EARLIER, "a/b/c", "--dry-run", "--space", str(tmp_path / "space"))
    assert result.returncode == 1
    assert "'namespace/repo_name': 'a/b/c'" in result.stderr
    assert not result.stdout
    assert not (tmp_path / "space").exists()


def test_an_upload_that_breaks_off_is_repeated_within_a_push(hub, tmp_path):
    hub.break_uploads(1)
    assert run_push(hub, tmp_path, EARLIER, "tester/model").returncode == 0
    assert hub.files("tester/model")["model.safetensors"] == (EARLIER / "model.safetensors").read_bytes()
    assert sum(request.startswith("PUT /lfs") for request in hub.requests) == 2


def test_a_killed_push_leaves_nothing_and_is_complete_when_repeated(hub, tmp_path):
    def push() -> None:
        become_client(hub, tmp_path)
        push_folder(EARLIER, "tester/model")

    stalled = hub.stall_uploads()
    pid = forks.start(push, tmp_path / "log")
    assert stalled.wait(60)
    os.kill(pid, signal.SIGKILL)
    forks.end(pid)
    hub.stalled = None
    hub.resume.set()
    assert hub.files("tester/model") == {}
    assert run_push(hub, tmp_path, EARLIER, "tester/model").returncode == 0
    assert hub.files("tester/model")["model.safetensors"] == (EARLIER / "model.safetensors").read_bytes()


def test_files_in_the_repository_are_not_sent_again(pushed, tmp_path):
    assert run_push(pushed, tmp_path, EARLIER, "tester/model").returncode == 0
    assert not any("PUT" in request or "/commit/" in request for request in pushed.requests)


def test_weights_of_an_earlier_push_are_deleted(pushed, checkpoint, tmp_path):
    assert run_push(pushed, tmp_path, checkpoint, "tester/model").returncode == 0
    weights = {name for name in pushed.files("tester/model") if "safetensors" in name}
    assert weights == {path.name for path in checkpoint.glob("*.safetensors*")}


def test_a_download_that_breaks_off_is_completed_and_ranges_are_served(pushed, tmp_path):
    pushed.break_downloads(1)
    code = "from huggingface_hub import hf_hub_download; print(hf_hub_download('tester/model', 'model.safetensors'))"
    environment = pushed.environment(tmp_path / "empty")
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    weights = (EARLIER / "model.safetensors").read_bytes()
    assert Path(result.stdout.strip()).read_bytes() == weights
    url = f"{pushed.endpoint}/tester/model/resolve/main/model.safetensors"
    part = urllib.request.Request(url, headers={"Range": "bytes=100-"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(part) as response:
        assert response.status == 206
        assert response.read() == weights[100:]
        assert response.headers["Content-Range"] == f"bytes 100-{len(weights) - 1}/{len(weights)}"
        assert response.headers["ETag"] == f'"{hashlib.sha256(weights).hexdigest()}"'


@pytest.mark.parametrize(
    ("token", "reason"),
    [("hf_wrong", "Invalid credentials"), (None, "Invalid username")],
)
def test_a_wrong_token_gets_a_clear_error(hub, tmp_path, token, reason):
    result = run_push(hub, tmp_path, EARLIER, "tester/model", token=token)
    assert result.returncode == 1
    assert hub.repositories == {}
    last = result.stderr.strip().splitlines()[-1]
    assert "The token cannot write to 'tester/model' (401" in last
    assert reason in last
    assert "hf auth login" in last


def test_a_card_written_by_hand_in_the_repository_stays(pushed, tmp_path):
    mine = Path(shutil.copytree(EARLIER, tmp_path / "mine"))
    (mine / "README.md").write_text("# Mine\n")
    run_push(pushed, tmp_path, mine, "tester/model")
    assert pushed.files("tester/model")["README.md"] == b"# Mine\n"
    assert run_push(pushed, tmp_path, EARLIER, "tester/model").returncode == 0
    assert pushed.files("tester/model")["README.md"] == b"# Mine\n"


def test_an_incomplete_checkpoint_raises(checkpoint, tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        collect(tmp_path / "nothing", "me/model")
    (checkpoint / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"is incomplete: .* names 'model-00002-of-00002.safetensors'"):
        collect(checkpoint, "me/model")
    for path in checkpoint.glob("model*"):
        path.unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="holds no safetensors, the only weights that are pushed"):
        collect(checkpoint, "me/model")
    (checkpoint / "unet_adapter.json").write_text("{}")
    with pytest.raises(ValueError, match="sdllava merge"):
        collect(checkpoint, "me/model")
