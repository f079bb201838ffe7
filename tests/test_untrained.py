"""A model that was assembled and never trained says so, until its first training step."""

import pytest
import torch
from PIL import Image
from test_cli import run
from train_fixtures import command

from sdllava import SDLlavaConfig, SDLlavaForConditionalGeneration, SDLlavaProcessor
from sdllava.commands.reporting import UNTRAINED
from sdllava.demo.engine import Engine
from sdllava.demo.page import build_page
from sdllava.parts import read_llava_parts, read_parts
from sdllava.train.adapters import merge
from sdllava.train.run import train


def test_an_assembled_model_is_recorded_as_untrained(composed, published, tmp_path):
    config = SDLlavaConfig.from_pretrained(composed)
    assert config.is_trained is False
    with pytest.raises(TypeError, match="is_trained"):
        read_parts(vision=published["clip"], language_model=published["llm"], is_trained=True)
    fields = {"image_size": 64, "grid_size": 4, "fusion_num_attention_heads": 4}
    kept = read_llava_parts(published["llava"], published["sd2"], **fields).config  # answers as the LLaVA
    new = read_llava_parts(published["llava"], published["sd2"], fusion="concat", **fields).config
    assert (kept.is_trained, new.is_trained) == (None, False)


def test_a_training_step_changes_the_record_and_evaluation_does_not(composed, tmp_path):
    model = SDLlavaForConditionalGeneration.from_pretrained(composed)
    ids = torch.tensor([[1, 5, 6]])
    model.eval()(input_ids=ids, labels=ids)
    assert model.config.is_trained is False
    model.train()(input_ids=ids, labels=ids)
    model.save_pretrained(tmp_path)
    assert SDLlavaConfig.from_pretrained(tmp_path).is_trained is True


@pytest.mark.slow
def test_trained_and_merged_checkpoints_are_recorded_as_trained(work):
    assert SDLlavaConfig.from_pretrained(work / "trained").is_trained is True
    parts = SDLlavaForConditionalGeneration.from_pretrained(work / "trained")
    parts.config.is_trained = False
    parts.save_pretrained(work / "base")
    SDLlavaProcessor.from_pretrained(work / "trained").save_pretrained(work / "base")
    train(command(work, "lora", init_from=work / "base", lora_r=2, max_steps=1, save_strategy="no"))
    merge(str(work / "lora"), str(work / "merged"))
    assert SDLlavaConfig.from_pretrained(work / "merged").is_trained is True


def test_commands_and_the_page_warn(composed, tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "p.png")
    done = run("ask", tmp_path / "p.png", "What?", "--model", composed, "--max-new-tokens", 1)
    assert f"Warning: {UNTRAINED}" in done.stderr
    engine = Engine.from_pretrained(str(composed), "cpu")
    texts = [block["props"].get("value") for block in build_page(engine).config["components"]]
    assert f"**{UNTRAINED}**" in texts
    engine.model.config.is_trained = None
    texts = [block["props"].get("value") for block in build_page(engine).config["components"]]
    assert f"**{UNTRAINED}**" not in texts
