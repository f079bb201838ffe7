"""What travels with a checkpoint loads where the package is not installed, and the wheel holds what it needs."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from without_package import REFUSE_PACKAGE

from sdllava import SDLlavaForConditionalGeneration, SDLlavaProcessor

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sdllava"


def test_the_code_of_a_checkpoint_gives_the_same_model(composed):
    name = "modeling_sdllava.SDLlavaForConditionalGeneration"
    travelled = get_class_from_dynamic_module(name, str(composed)).from_pretrained(composed)
    assert type(travelled).__module__.startswith("transformers_modules.")
    assert type(travelled.config).__module__.startswith("transformers_modules.")
    model = SDLlavaForConditionalGeneration.from_pretrained(composed)
    inputs = tiny.image_inputs(1)
    with torch.no_grad():
        features, expected = (m.get_image_features(**inputs).pooler_output for m in (travelled, model))
    torch.testing.assert_close(features[0], expected[0], rtol=0, atol=1e-5)


WITHOUT_PACKAGE = (
    REFUSE_PACKAGE
    + """
import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor
from transformers import pipeline
from transformers.models.auto.modeling_auto import AutoModelForVisualQuestionAnswering
folder, image = sys.argv[1:]
trust = {"trust_remote_code": True}
assert type(AutoConfig.from_pretrained(folder, **trust)).__name__ == "SDLlavaConfig"
with torch.device("meta"):
    config = AutoConfig.from_pretrained(folder, **trust)
    for auto in (AutoModelForMultimodalLM, AutoModelForVisualQuestionAnswering):
        assert type(auto.from_config(config, **trust)).__name__ == "SDLlavaForConditionalGeneration"
    assert type(AutoModel.from_config(config, **trust)).__name__ == "SDLlavaModel"
processor = AutoProcessor.from_pretrained(folder, **trust)
model = AutoModelForImageTextToText.from_pretrained(folder, **trust)
assert type(model).__name__ == "SDLlavaForConditionalGeneration"
content = [{"type": "image", "path": image}, {"type": "text", "text": "What?"}]
inputs = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True,
    tokenize=True, return_dict=True, return_tensors="pt")
with torch.no_grad():
    print("LOGITS", model(**inputs).logits[0, -1, :5].tolist())
vqa = pipeline("visual-question-answering", model=folder, **trust)
print("ANSWER", vqa(image=image, question="What?", max_new_tokens=3))
model.save_pretrained(sys.argv[1] + "-again")
processor.save_pretrained(sys.argv[1] + "-again")
"""
)


@pytest.mark.slow
def test_a_checkpoint_loads_where_the_package_is_not_installed(composed, tmp_path):
    Image.effect_noise((30, 20), 80).convert("RGB").save(tmp_path / "p.png")
    arguments = [sys.executable, "-c", WITHOUT_PACKAGE, str(composed), str(tmp_path / "p.png")]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines() if line.startswith(("LOGITS", "ANSWER")))

    model = SDLlavaForConditionalGeneration.from_pretrained(composed).eval()
    content = [{"type": "image", "path": str(tmp_path / "p.png")}, {"type": "text", "text": "What?"}]
    inputs = SDLlavaProcessor.from_pretrained(composed).apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip
    with torch.no_grad():
        expected = model(**inputs).logits[0, -1, :5]
    torch.testing.assert_close(torch.tensor(ast.literal_eval(lines["LOGITS"])), expected, rtol=0, atol=1e-5)
    assert "answer" in lines["ANSWER"]
    # what such a process saves loads here without trust_remote_code
    again = SDLlavaForConditionalGeneration.from_pretrained(f"{composed}-again")
    weights = model.state_dict()
    assert all(torch.equal(x, weights[name]) for name, x in again.state_dict().items())


@pytest.mark.slow
def test_the_wheel_installs_and_holds_its_data(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path)]
    subprocess.run([*build, str(ROOT)], check=True, timeout=300, capture_output=True)
    (wheel,) = tmp_path.glob("sdllava-*.whl")
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "-q", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True, timeout=300, capture_output=True)
    names = zipfile.ZipFile(wheel).namelist()
    assert "sdllava/py.typed" in names
    data = [p for p in PACKAGE.rglob("*") if p.suffix in (".yaml", ".json", ".safetensors", ".jinja")]
    missing = {str(p.relative_to(ROOT)) for p in data} - set(names)
    assert not missing
    assert {name.split("/")[0] for name in names if not name.startswith("sdllava-")} == {"sdllava"}
    done = subprocess.run(
        [sys.executable, "-c", INSTALLED], capture_output=True, text=True, cwd=tmp_path,
        env={"PYTHONPATH": str(target)}, timeout=300,
    )  # fmt: skip
    assert done.stdout.split() == [str(target / "sdllava"), "sdllava"], done.stderr[-2000:]


INSTALLED = """
import pathlib
import sdllava
from sdllava.evaluation.metrics import metric_path
from sdllava.train.recipe_loading import list_recipes
assert (sdllava.mini_path() / "model.safetensors").is_file()
assert (metric_path() / f"{metric_path().name}.py").is_file()
assert {"own-data/lora", "clip/align"} <= set(list_recipes())
print(pathlib.Path(sdllava.__file__).parent, sdllava.SDLlavaConfig.model_type)
"""
