"""The commands of docs/finetune.md run as written, on fewer questions and for two steps."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sdllava.commands.main import app

PAGE = (Path(__file__).parents[1] / "docs" / "finetune.md").read_text()
(PYTHON,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S) for line in block.splitlines()]
SMALLER = {"train": ["--max_steps", "2", "--global_batch_size", "4", "--use_cpu", "true", "--report_to", "none"]}


@pytest.mark.slow
def test_the_page_trains_and_scores(tmp_path, monkeypatch):
    pytest.importorskip("easy_vqa")
    monkeypatch.chdir(tmp_path)
    assert "dumps(rows)" in PYTHON
    exec(PYTHON.replace("dumps(rows)", "dumps(rows[:80])"), {})
    outputs = []
    for command in COMMANDS:
        program, name, *arguments = shlex.split(command)
        if program == "sdllava":
            arguments = [argument.replace("500", "12") for argument in arguments]
            result = CliRunner().invoke(app, [name, *arguments, *SMALLER.get(name, [])])
            assert result.exit_code == 0, result.output
            outputs.append(result.output)
    check, _, score = outputs
    assert "brown" in check
    assert "80 samples" in check
    assert Path("runs/easy-vqa/config.json").is_file()
    assert "accuracy" in score
    assert {path.parts[1] for path in Path("results").rglob("results.json")} == {"runs-easy-vqa", "mini"}
