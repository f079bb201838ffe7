"""Run against the loopback Hub by test_hub_roundtrip.py: train two steps, push after the first and at the end."""

import sys
from pathlib import Path

import train_fixtures

from sdllava.train import run

work = Path(sys.argv[1])
train_fixtures.write_parts(work)
train_fixtures.write_colours(work / "data")
flags = {"max_steps": 2, "save_steps": 1, "push_to_hub": "true", "hub_model_id": "tester/trained"}
run.train(train_fixtures.command(work, "run", **flags))
