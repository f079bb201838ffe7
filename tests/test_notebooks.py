"""The notebooks run on the miniature; they are committed without outputs, and open in Colab."""

import tomllib
from pathlib import Path

import pytest
import torch

nbformat = pytest.importorskip("nbformat")

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
SHORTER = {
    "easy_vqa": {"get_train_image_paths(), 160)": "get_train_image_paths(), 32)", "paths(), 24)": "paths(), 8)"},
    "measure_leakage": {"limit=12, batch_size=12": "limit=4, batch_size=4"},
    "upgrade_a_llava": {'"train", 200': '"train", 32', "max_steps=4": "max_steps=2"},
}
"""Smaller counts for a test, which measures nothing: what stands in the notebook, and what is executed."""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_have_no_outputs_and_open_in_colab(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)
    address = REPOSITORY.replace("https://github.com", "https://colab.research.google.com/github")
    badge = f"({address}/blob/main/notebooks/{path.name})"
    assert badge in notebook.cells[0].source
    assert badge in (ROOT / "docs" / "notebooks.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path, tmp_path, monkeypatch):
    """In IPython in this process: a kernel per notebook would import torch and the libraries each time."""
    shells = pytest.importorskip("IPython.core.interactiveshell")
    capture = pytest.importorskip("IPython.utils.capture").capture_output
    if path.stem == "easy_vqa":
        pytest.importorskip("easy_vqa")
    monkeypatch.chdir(tmp_path)
    shell = shells.InteractiveShell()
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    for old, new in SHORTER.get(path.stem, {}).items():
        assert sum(old in cell for cell in cells) == 1, old
        cells = [cell.replace(old, new) for cell in cells]
    threads = torch.get_num_threads()
    with capture() as captured:
        for cell in cells:
            shell.run_cell(cell).raise_error()
    torch.set_num_threads(threads)
    assert captured.stdout or captured.outputs
