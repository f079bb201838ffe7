"""Run against the loopback Hub by test_hub_roundtrip.py: train two steps and push through the Trainer."""

import sys
from pathlib import Path

import train_fixtures
from sdllava.train.record import TrainingRecord
from trl import SFTConfig

from sdllava.train import run
from sdllava.train.arguments import AdapterArguments, DataArguments, ModelArguments
from sdllava.train.recipes import parse_arguments

work = Path(sys.argv[1])
train_fixtures.write_parts(work)
train_fixtures.write_colours(work / "data")
flags = train_fixtures.command(work, "run", max_steps=2, save_steps=2, hub_model_id="tester/trained")
model_args, adapter_args, data_args, training_args = parse_arguments(
    (ModelArguments, AdapterArguments, DataArguments, SFTConfig), flags
)
run.prepare_training_arguments(training_args, model_args, data_args)
collator = run.build_collator(run.build_processor(model_args), model_args, data_args, training_args)
data = run._load(data_args, training_args.seed, data_args.datasets)
trainer = run.build_trainer(model_args, adapter_args, data_args, training_args, collator, data)
trainer.add_callback(TrainingRecord(run._settings(model_args, adapter_args, data_args, training_args)))
trainer.train()
trainer.push_to_hub()
