"""What a run records for its model card."""

import json
from types import SimpleNamespace

from sdllava.train.callbacks import HYPERPARAMETERS, TrainingRecordCallback


def test_the_time_of_all_sessions_is_recorded_and_a_new_run_begins_at_zero(tmp_path):
    args = SimpleNamespace(output_dir=str(tmp_path), world_size=2, **dict.fromkeys(HYPERPARAMETERS, 1))
    settings = {"stage": "align", "init_from": None, "datasets": [{"path": "/home/me/x.json"}], "hub_token": None}
    path = tmp_path / "training.json"

    def session(first_step: int, last_step: int) -> dict:
        state = SimpleNamespace(global_step=first_step, is_world_process_zero=True)
        record = TrainingRecordCallback(settings)
        record.on_train_begin(args, state, None)
        record.begin -= 100  # as if it had taken that long
        state.global_step = last_step
        record.on_save(args, state, None)
        (stage,) = json.loads(path.read_text())["stages"]
        return stage

    first = session(0, 5)
    assert 100 <= first["seconds"] < 110
    assert first["steps"] == 5
    assert first["processes"] == 2
    assert first["settings"]["datasets"] == [{"path": "x.json"}]
    assert first["settings"]["learning_rate"] == 1
    assert 200 <= session(5, 9)["seconds"] < 220
    assert 100 <= session(0, 9)["seconds"] < 110
