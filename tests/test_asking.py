"""The table of what conditioning on the question gains, and one pair of runs at the smallest scale."""

import pytest
from typer.testing import CliRunner

pytest.importorskip("trl")
from research.miniature.__main__ import app
from research.miniature.asking import table


def test_the_table_has_gains_with_their_errors():
    rows = {
        "1 token": {
            "question": [{"questions": 52.0, "pairs": 10.0}, {"questions": 56.0, "pairs": 12.0}],
            "none": [{"questions": 50.0, "pairs": 10.0}, {"questions": 50.0, "pairs": 10.0}],
        },
        "4 tokens": {"question": [{"questions": 40.0}], "none": [{"questions": 41.5}]},
    }
    assert table(rows).splitlines() == [
        "| variant | questions | pairs | compositions | without the question |",
        "|---|---|---|---|---|",
        "| 1 token | +4.0 ± 2.0 | +1.0 ± 1.0 |  | 50.0 |",
        "| 4 tokens | -1.5 |  |  | 41.5 |",
    ]


def test_an_unknown_variant(tmp_path):
    result = CliRunner().invoke(app, ["asking", "--out", str(tmp_path), "--variant", "2 tokens"])
    assert result.exit_code == 1
    assert "Unknown variant '2 tokens'. Use one of '16 tokens'" in result.output


@pytest.mark.slow
@pytest.mark.usefixtures("few_resamples")
def test_a_pair_of_runs(tmp_path):
    arguments = ["--out", str(tmp_path), "--variant", "1 token", "--seeds", "1", "--scenes", "6", "--limit", "9"]
    result = CliRunner().invoke(app, ["asking", *arguments])
    assert result.exit_code == 0, result.output
    assert "| 1 token |" in result.output
    assert (tmp_path / "asking.json").is_file()
