"""Run against the loopback Hub by test_hub_roundtrip.py, where `sdllava` is installed, with an empty cache.

Answers with the pushed adapter and pipeline, then trains two steps, pushing after each and at the end. Arguments: the
folder of the expected answers, a folder for the run.
"""

import sys
from pathlib import Path

import hub_answers
import torch
import train_fixtures
from safetensors.torch import load_file
from transformers import pipeline

from sdllava import SDLlavaForConditionalGeneration, SDLlavaProcessor
from sdllava.train import run

memory, work = map(Path, sys.argv[1:])
model = SDLlavaForConditionalGeneration.from_pretrained("tester/adapter")
logits = hub_answers.prompt_logits(model, SDLlavaProcessor.from_pretrained("tester/adapter"))
assert torch.equal(logits, load_file(memory / "logits.safetensors")["adapter"])
vqa = pipeline("visual-question-answering", model="tester/sharded")
hub_answers.move_weights(vqa.model)
assert type(vqa).__module__ == "sdllava.pipeline"
answer = vqa(image=hub_answers.picture(), question=hub_answers.QUESTION, max_new_tokens=8)
(work / "pipeline.txt").write_text(repr(answer))

train_fixtures.write_parts(work)
train_fixtures.write_colours(work / "data")
flags = {"max_steps": 2, "save_steps": 1, "push_to_hub": "true", "hub_model_id": "tester/trained"}
run.train(train_fixtures.command(work, "run", **flags))
