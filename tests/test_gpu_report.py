"""The GPU report as a dry run, and the page about memory in training."""

import importlib
import inspect
import time
from dataclasses import replace
from pathlib import Path

import pytest
import typer


@pytest.fixture(autouse=True)
def perf_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "perf"))


def fail():
    raise ValueError("broken")


def test_sections_that_fail_or_take_too_long_are_reported():
    import gpu_report

    assert gpu_report.run(fail, (), "fork", 30) == "failed (exit status 1)"
    assert gpu_report.run(time.sleep, (60,), "fork", 0.1) == "stopped after 0 s"


@pytest.mark.slow
def test_a_dry_run_writes_every_section_also_where_one_fails(tmp_path, monkeypatch):
    import gpu_report

    broken = replace(gpu_report.SECTIONS["memory"], small={"unknown": 1})
    monkeypatch.setitem(gpu_report.SECTIONS, "memory", broken)
    gpu_report.main(tmp_path / "report.md", ["follow-up", "training", "memory", "kernels"], 30, "mini", "cpu")
    text = (tmp_path / "report.md").read_text()
    assert "| Memory of an answer | failed (exit status 1) |" in text
    assert "unexpected keyword argument 'unknown'" in text
    assert "`python perf/training.py --batch 1 --steps 1 --repeats 1 --size mini" in text
    for row in (
        "follow-up question, with the prefix",
        "align, batches of 1",
        "finetune, batches of 1",
        "flash, batch 1",
    ):
        assert f"\n| {row} | " in text


@pytest.mark.slow
def test_sections_without_time_are_named(tmp_path):
    import gpu_report

    gpu_report.main(tmp_path / "report.md", ["answering"], 0, "mini", "cpu")
    assert "not run: no time left" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("size", ["full", "mini"])
def test_every_section_is_a_command_of_its_script(size, tmp_path):
    import gpu_report

    output = tmp_path / "out.json"
    for section in gpu_report.SECTIONS.values():
        arguments = gpu_report.section_arguments(section, size, "cpu", "float32", output)
        if section.module == "pytest":
            assert any(path.endswith("test_model.py") for path in arguments["args"])
            continue
        main = importlib.import_module(section.module).main
        inspect.signature(main).bind(**arguments)
        app = typer.Typer()
        app.command()(main)
        command = typer.main.get_command(app)
        parsed = command.make_context("", gpu_report.command_line(section, arguments)[1:]).params
        assert {name: parsed[name] for name in arguments} == {**arguments, "output": output}


def test_every_row_of_the_memory_page_has_a_model():
    import memory_table
    import models

    for name in memory_table.ROWS:
        for way in memory_table.WAYS:
            config = memory_table.configuration(memory_table.settings(name, way.stage), models.text_config("mini"))
            assert config.num_image_tokens < memory_table.LENGTHS[way.stage], name


def test_cells_hold_the_largest_batch_of_each_gpu():
    import memory_table

    assert memory_table.cell(10 * 2**30, 2**30) == "10.0: 8 / 32 / 32"
    assert memory_table.cell(30 * 2**30, 2**30) == "30.0: – / 8 / 32"


def test_lora_on_the_unet_and_the_language_model_trains_only_adapters_and_new_parts():
    import memory_table
    import models

    model = memory_table.build("sdxl-no-caption-lora", memory_table.WAYS[1], models.text_config("mini"))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all("lora_" in name or ".modules_to_save." in name for name in trained)
    for part in (".unet.", ".language_model.", ".multi_modal_projector."):
        assert any(part in name for name in trained)
