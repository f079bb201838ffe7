"""The commands of docs/finetune.md run as written, on fewer questions and for two steps."""

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image
from test_eval_third_party import write_nlvr, write_shapes
from typer.testing import CliRunner

from sdllava.commands.main import app
from sdllava.data.sources import DataSource, load_data
from sdllava.evaluation.benchmarks import get_benchmark

PAGE = (Path(__file__).parents[1] / "docs" / "finetune.md").read_text()
PYTHON, STATEMENTS = re.findall(r"```python\n(.*?)```", PAGE, re.S)
BASH = re.findall(r"```bash\n(.*?)```", PAGE.partition("## SHAPES")[0], re.S)
COMMANDS = [line for block in BASH for line in block.splitlines()]
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


def test_shapes_and_nlvr_are_written_as_training_data(tmp_path, monkeypatch):
    """NLVR's halves for training and for the test share no sample."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shapes_dataset").mkdir()
    write_shapes(
        tmp_path / "shapes_dataset", "train.large", [("is a square red", "true"), ("is a circle red", "false")]
    )
    rows = [("1571-0", "There is a blue box", "true"), ("32-2", "All boxes are black", "false")]
    write_nlvr(tmp_path / "nlvr" / "dev", rows)
    exec(STATEMENTS, {})
    shapes, nlvr = (load_data([DataSource(f"{name}.json", f"{name}-images")]) for name in ("shapes", "nlvr"))
    texts = [[message["content"] for message in row["messages"]] for row in (*shapes, nlvr[0])]
    assert texts == [
        ["<image>\nis a square red?", "yes"],
        ["<image>\nis a circle red?", "no"],
        ["<image>\nThere is a blue box True or false?", "yes"],
    ]
    assert Image.open("shapes-images/1.png").getpixel((2, 2)) == (255, 0, 0)
    assert len(nlvr) == len(list(Path("nlvr-images").iterdir())) == 6
    tested = get_benchmark("nlvr", "even").read(Path("nlvr/dev"))
    assert {sample.info["group"] for sample in tested} == {"32"}
