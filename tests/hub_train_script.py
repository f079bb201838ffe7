"""Run against the loopback Hub by test_hub_roundtrip.py: train two steps and push through the Trainer."""

import sys
from pathlib import Path

import train_fixtures

from sdllava.train import run

work = Path(sys.argv[1])
train_fixtures.write_parts(work)
train_fixtures.write_colours(work / "data")
flags = train_fixtures.command(work, "run", max_steps=2, save_steps=2, hub_model_id="tester/trained")
arguments = run.parse_run(flags)
collator = run.build_collator(arguments, run.build_processor(arguments.model))
trainer = run.build_trainer(arguments, collator, run.load_sources(arguments, arguments.data.datasets))
trainer.train()
trainer.push_to_hub()
