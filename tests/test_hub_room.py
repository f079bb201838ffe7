"""Who may import whom, what travels with a checkpoint, what the wheel holds."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from sdllava import SDLlavaForConditionalGeneration, SDLlavaProcessor
from sdllava.remote_code import CODE_FILES

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sdllava"
HUB_ROOM = {name.removesuffix(".py") for name in CODE_FILES}

HUB = {"registration", *(file.stem for file in PACKAGE.glob("hub*.py"))}
ALLOWED = {
    "data": {"data"},
    "train": {"train", "data", *HUB, *HUB_ROOM},
    "evaluation": {"evaluation", "data", *HUB, *HUB_ROOM},
    "analysis": {"analysis", "data", *HUB, *HUB_ROOM},
    "hub": {*HUB, *HUB_ROOM},
    **dict.fromkeys(HUB_ROOM, HUB_ROOM),
}
"""The rooms of the package that each room may import; those not named may import everything."""


def imported_rooms(file: Path) -> set[str]:
    """Rooms of this package that a module imports, at any depth of its code."""
    package = ("sdllava", *file.relative_to(PACKAGE).with_suffix("").parts)
    rooms = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            names = [f"{module}.{alias.name}" for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("sdllava.") and name.count(".")}
    return rooms


def room_files(room: str) -> list[Path]:
    single = PACKAGE / f"{room}.py"
    files = [single] if single.exists() else []
    return files + sorted((PACKAGE / room).rglob("*.py")) + sorted(PACKAGE.glob(f"{room}_*.py"))


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_the_arrows_between_rooms(room):
    rooms = {p.name for p in PACKAGE.iterdir() if p.is_dir()} | {p.stem for p in PACKAGE.glob("*.py")}
    for file in room_files(room):
        if file.name == "cli.py" or file.stem.endswith("_cli"):
            continue
        wrong = (imported_rooms(file) & rooms) - ALLOWED[room] - {room}
        assert not wrong, f"{file.relative_to(ROOT)} imports {wrong}"


def test_the_code_beside_a_checkpoint_imports_siblings_only():
    for name in CODE_FILES:
        for node in ast.walk(ast.parse((PACKAGE / name).read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module and "." not in node.module, f"{name}: {ast.unparse(node)}"
                assert f"{node.module}.py" in CODE_FILES, f"{name} needs {node.module}"


WITHOUT_PACKAGE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "sdllava":
            raise ModuleNotFoundError("sdllava is not installed")
sys.meta_path.insert(0, Refuse())
import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor
from transformers import pipeline
from transformers.models.auto.modeling_auto import AutoModelForVisualQuestionAnswering
folder, image = sys.argv[1:]
trust = {"trust_remote_code": True}
assert type(AutoConfig.from_pretrained(folder, **trust)).__name__ == "SDLlavaConfig"
for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModelForVisualQuestionAnswering):
    assert type(auto.from_pretrained(folder, **trust)).__name__ == "SDLlavaForConditionalGeneration"
assert type(AutoModel.from_pretrained(folder, **trust)).__name__ == "SDLlavaModel"
processor = AutoProcessor.from_pretrained(folder, **trust)
model = AutoModelForImageTextToText.from_pretrained(folder, **trust)
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
    # what such a process saves loads here, without a word about remote code
    again = SDLlavaForConditionalGeneration.from_pretrained(f"{composed}-again")
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in again.state_dict().items())


@pytest.mark.slow
def test_the_wheel_installs_and_holds_its_data(tmp_path):
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(build, check=True, timeout=300, capture_output=True)
    (wheel,) = tmp_path.glob("sdllava-*.whl")
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "-q", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True, timeout=300, capture_output=True)
    names = zipfile.ZipFile(wheel).namelist()
    assert "sdllava/py.typed" in names
    data = [p for p in PACKAGE.rglob("*") if p.suffix in (".yaml", ".json", ".safetensors", ".jinja")]
    missing = {str(p.relative_to(ROOT)) for p in data} - set(names)
    assert not missing
    code = "import sdllava, pathlib; print(pathlib.Path(sdllava.__file__).parent, sdllava.SDLlavaConfig.model_type)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(target)},
        timeout=300,
    )  # fmt: skip
    assert done.stdout.strip() == f"{target / 'sdllava'} sdllava", done.stderr[-2000:]
