# ruff: noqa: E402
"""Run against the loopback Hub by test_hub_roundtrip.py, where `sdllava` cannot be imported: load with the code in the
repositories. Argument: folder of what is remembered."""

import sys
from pathlib import Path

sys.modules["sdllava"] = None  # as where the package is not installed

import torch
from hub_answers import QUESTION, answers, ask_logits, picture
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

memory = Path(sys.argv[1])
expected = load_file(memory / "logits.safetensors")["whole"]
said = []
for repository in ("tester/sharded", "tester/whole", "tester/left-out"):
    model = AutoModelForImageTextToText.from_pretrained(repository, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(repository, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    # the weights are the same bits; where memory lies otherwise, sums may differ in their last
    torch.testing.assert_close(ask_logits(model, processor), expected, rtol=0, atol=1e-5, msg=repository)
    assert answers(model, processor) == (memory / "answers.txt").read_text().split("\n"), repository
    vqa = pipeline("visual-question-answering", model=repository, trust_remote_code=True)
    (answer,) = vqa(image=picture(), question=QUESTION, max_new_tokens=8)
    said.append((answer["answer"], round(answer["score"], 4)))
assert said[0] == said[1] == said[2] and isinstance(said[0][0], str), said
Path(memory, "pipeline.txt").write_text(repr(said[0]))
