"""The code of docs/trainer.md runs as written, apart from its paths and its length."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from sdllava import SDLlavaConfig, SDLlavaForConditionalGeneration

PAGE = Path(__file__).parents[1] / "docs" / "trainer.md"
CODE = dict(zip(("trainer", "sft"), re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trainer", "sft"])
def test_the_code_of_the_page_trains(name, work, tmp_path, monkeypatch):
    report_to = "trackio" if name == "sft" and find_spec("trackio") else "none"
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    changes = {
        '"YOUR_CHECKPOINT"': repr(str(work / "trained")),
        '"own.json"': repr(str(work / "data" / "colours.json")),
        '"images"': repr(str(work / "data")),
        f'"runs/{name}"': repr(str(tmp_path / "out")),
        "max_steps=100": f'max_steps=2, use_cpu=True, report_to="{report_to}", bf16=False, save_strategy="no"',
        "learning_rate=2e-5": "learning_rate=1e-2",
    }
    code = CODE[name]
    for old, new in changes.items():
        assert old in code
        code = code.replace(old, new)
    spaces: dict = {}
    exec(compile(code, f"{PAGE.name}:{name}", "exec"), spaces)
    assert spaces["trainer"].state.global_step == 2
    assert all(0 < entry["loss"] < 10 for entry in spaces["trainer"].state.log_history if "loss" in entry)
    assert (tmp_path / "trackio" / "huggingface.db").is_file() == (report_to == "trackio")
    before = SDLlavaForConditionalGeneration.from_pretrained(work / "trained").state_dict()
    after = SDLlavaForConditionalGeneration.from_pretrained(tmp_path / "out").state_dict()
    changed = {key.split(".")[1] for key in before if not before[key].equal(after[key])}
    assert {"language_model", "multi_modal_projector"} <= changed
    assert not {"vision_tower", "diffusion_tower"} & changed
    assert SDLlavaConfig.from_pretrained(tmp_path / "out").is_trained is not False
