"""Visitors of the demo page at the same time."""

import pytest

pytest.importorskip("gradio", reason="the demo page needs gradio")
from page_load import load_page


@pytest.mark.slow
def test_visitors_at_the_same_time_are_answered_and_shown_their_position(composed):
    result = load_page(str(composed), visitors=20, max_tokens=8)
    assert result["outcomes"] == {"answered, right": 19, "bad upload, message": 1}
    assert result["position"] > 5
