# ruff: noqa: E402
"""Run against the loopback Hub by test_hub_roundtrip.py, where `sdllava` cannot be imported.

Loads with the code in the repositories. Argument: folder of the expected answers.
"""

import sys
from pathlib import Path

sys.modules["sdllava"] = None  # as where the package is not installed

import torch
from hub_answers import QUESTION, answers, move_weights, picture, prompt_logits
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

memory = Path(sys.argv[1])
expected = load_file(memory / "logits.safetensors")["whole"]
for repository in ("tester/sharded", "tester/whole", "tester/left-out"):
    model = AutoModelForImageTextToText.from_pretrained(repository, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(repository, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    assert torch.equal(prompt_logits(model, processor), expected), repository
    assert answers(model, processor) == (memory / "answers.txt").read_text().split("\n"), repository
vqa = pipeline("visual-question-answering", model="tester/sharded", trust_remote_code=True)
move_weights(vqa.model)
answered = vqa(image=picture(), question=QUESTION, max_new_tokens=8)
assert isinstance(answered[0]["answer"], str), answered
Path(memory, "pipeline.txt").write_text(repr(answered))
