"""The GPU report as a dry run, and the page about memory in training."""

import time
from dataclasses import replace
from pathlib import Path

import pytest


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
