"""Cached features: equal to uncached ones, resumable, shared, and refused where they do not fit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from train_fixtures import command, losses, weights, write_colours, write_parts

from sdllava.data.sources import DataSource, load_data
from sdllava.train.arguments import AdapterArguments, ModelArguments
from sdllava.train.build import build_model, build_processor
from sdllava.train.cache import RECORD, FeatureCache, begin_cache, differences, image_key, write_shards
from sdllava.train.cache_writer import write_cache
from sdllava.train.collator import SDLlavaCollator
from sdllava.train.run import cache, train


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("work")
    write_parts(root)
    write_colours(root / "data")
    return root


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


FIXED = {"fixed_noise": "true"}
SGD = {"optim": "sgd", "learning_rate": 0.5}  # Adam turns rounding into whole steps where a gradient is nearly zero
CASES = {
    "latents": ({}, ["latents"]),
    "static": (FIXED, ["vision_features", "unconditional_features", "latents"]),
    "static-align": (
        {**FIXED, "diffusion_prompt": "none", "stage": "align"},
        ["vision_features", "unconditional_features"],
    ),
    "conditional": (
        {**FIXED, "prompt_dropout": 0.5},
        ["vision_features", "unconditional_features", "conditional_features"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_cached_equals_uncached(work, case):
    flags, names = CASES[case]
    flags = {**flags, **SGD}
    folder = work / f"cache-{case}"
    written = cache(command(work, "unused", **flags), str(folder), case.partition("-")[0], "float32", 4)
    assert written == (20 if case == "conditional" else 10)
    found = FeatureCache(folder)
    assert found.record["tensors"] == names
    assert len(found) == written
    train(command(work, f"{case}-slow", **flags))
    train(command(work, f"{case}-fast", feature_cache=folder, **flags))
    assert losses(work / f"{case}-fast") == pytest.approx(losses(work / f"{case}-slow"), abs=1e-5)
    expected = weights(work / f"{case}-slow")
    for name, tensor in weights(work / f"{case}-fast").items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=0, msg=name)


def test_a_half_precision_cache_is_read(work):
    folder = work / "cache-half"
    cache(command(work, "unused", **FIXED), str(folder), "static", "bfloat16", 4)
    train(command(work, "half", feature_cache=folder, max_steps=1, save_steps=1, **FIXED))
    assert {tensor.dtype for tensor in tensors(folder).values()} == {torch.bfloat16}


def test_a_sample_that_the_cache_left_out_is_bad_in_training(work):
    """Without a vision tower no image is opened any more, so the cache alone can know."""
    rows = json.loads((work / "data" / "colours.json").read_text())[:4]
    (work / "data" / "images" / "broken.png").write_bytes(b"x")
    rows[1]["image"] = "images/broken.png"
    (work / "data" / "broken.json").write_text(json.dumps(rows))
    flags = {"vision": None, "fusion_num_attention_heads": None, "train_data": work / "data" / "broken.json"}
    flags |= {"max_steps": 2, "save_steps": 2}
    assert cache(command(work, "u", bad_samples="skip", **flags), str(work / "left-out"), "latents", "float32", 8) == 3
    train(command(work, "left-out-slow", bad_samples="skip", **flags))
    flags["feature_cache"] = work / "left-out"
    train(command(work, "left-out-fast", bad_samples="skip", **flags))
    assert losses(work / "left-out-fast", 2) == pytest.approx(losses(work / "left-out-slow", 2), abs=1e-4)
    with pytest.raises(
        ValueError, match=r"broken\.json:1 sample 1 has the image 'images/broken\.png', which the feature"
    ):
        train(command(work, "left-out-fatal", **flags))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"fixed_noise": "false"}, "set fixed_noise"),
        ({"timesteps": 100}, r"its timesteps is \[50\], the run's is \[100\]"),
        ({"noise_seed": 3}, "its noise_seed is 0, the run's is 3"),
        ({"grid_size": 2}, "its grid_size is 4, the run's is 2"),
        ({"unet_lora_r": 2}, "trains what makes them"),
        ({"diffusion_prompt": "question"}, "set diffusion_prompt: none"),
    ],
)
def test_a_cache_that_does_not_fit_is_refused(work, changes, reason):
    folder, flags = work / "cache-refused", CASES["static-align"][0]
    cache(command(work, "unused", **flags), str(folder), "static", "float32", 8)
    with pytest.raises(ValueError, match=reason):
        train(command(work, "refused", feature_cache=folder, **{**flags, "stage": "finetune", **changes}))


def test_other_weights_are_refused(work, tmp_path):
    cache(command(work, "unused"), str(tmp_path / "cache"), "latents", "float32", 8)
    other = tmp_path / "parts"
    other.mkdir()
    write_parts(other)
    weights_file = other / "sd2" / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor + 0.1 for name, tensor in load_file(weights_file).items()}, weights_file)
    with pytest.raises(ValueError, match=r"its weights\.vae is"):
        train(command(work, "refused", feature_cache=tmp_path / "cache", diffusion=other / "sd2"))
    with pytest.raises(ValueError, match=r"its weights\.vae is"):
        cache(command(work, "unused", diffusion=other / "sd2"), str(tmp_path / "cache"), "latents", "float32", 8)


def test_an_interrupted_cache_goes_on(tmp_path):
    record = {"kind": "latents", "tensors": ["latents"]}
    items = [(image_key(str(i)), {"latents": torch.full((4,), float(i))}) for i in range(6)]

    def interrupted():
        yield from items[:4]
        raise KeyboardInterrupt

    begun = begin_cache(tmp_path, record)
    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path, interrupted(), shard_bytes=48)
    begun = begin_cache(tmp_path, record)
    assert len(begun) == 3
    write_shards(tmp_path, [item for item in items if item[0] not in begun], shard_bytes=48)
    whole = FeatureCache(tmp_path)
    assert len(whole) == 6
    for key, expected in items:
        assert torch.equal(whole.read(key)["latents"], expected["latents"])
    with pytest.raises(ValueError, match="its kind is 'latents', the run's is 'static'"):
        begin_cache(tmp_path, {**record, "kind": "static"})
    with pytest.raises(ValueError, match="written from the same data"):
        whole.read(image_key("none"))


def test_what_is_missing_alone_is_computed(work, tmp_path):
    folder = tmp_path / "cache"
    arguments = command(work, "unused")
    assert cache(arguments, str(folder), "latents", "float32", 3) == 10
    before = tensors(folder)
    shard = next(folder.glob("*.safetensors"))
    shard.unlink()
    assert cache(arguments, str(folder), "latents", "float32", 3) == 10
    assert cache(arguments, str(folder), "latents", "float32", 3) == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(folder).items())


def test_a_late_process_does_its_own_part(work, tmp_path):
    """The first process has written its shards before the second looks."""
    parts = {"diffusion": str(work / "sd2"), "vision": str(work / "clip"), "language_model": str(work / "lm")}
    sizes = {"image_size": 64, "grid_size": 4, "fusion_num_attention_heads": 4}
    run = ModelArguments(**parts, **sizes)
    model, collator = build_model(run, AdapterArguments()), SDLlavaCollator(build_processor(run))
    rows = load_data([DataSource(str(work / "data" / "colours.json"))])
    for process in (0, 1):
        count = write_cache(
            model, collator, rows, tmp_path / "cache", "latents", "float32", 3, process, num_processes=2
        )
        assert count == 5
    assert len(FeatureCache(tmp_path / "cache")) == 10


@pytest.mark.slow
def test_processes_share_the_work(work, tmp_path):
    script = (
        "import sys\nfrom torch import distributed\nfrom sdllava.train.run import cache\n"
        "print('WROTE', cache(sys.argv[2:], sys.argv[1], 'latents', 'float32', 3), flush=True)\n"
        "distributed.destroy_process_group()\n"
    )
    (tmp_path / "write.py").write_text(script)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29617"]
    arguments = [str(tmp_path / "write.py"), str(tmp_path / "cache"), *command(work, "unused")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    result = subprocess.run([*launcher, *arguments], capture_output=True, text=True, env=environment, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("WROTE 5") == 2
    cache(command(work, "unused"), str(tmp_path / "one"), "latents", "float32", 3)
    shared, alone = tensors(tmp_path / "cache"), tensors(tmp_path / "one")
    assert shared.keys() == alone.keys()
    for name, tensor in shared.items():
        torch.testing.assert_close(tensor, alone[name], atol=1e-5, rtol=0)


def test_the_size_is_said_first(work, tmp_path, capsys):
    cache(command(work, "unused"), str(tmp_path / "cache"), "latents", "bfloat16", 8)
    assert "10 keys of 0.5 KiB: 0.000 GiB in all; 10 left for process 0 of 1" in capsys.readouterr().out


def test_caches_that_make_no_sense_are_refused(work, tmp_path):
    with pytest.raises(ValueError, match="write a static cache"):
        cache(command(work, "u", diffusion_prompt="none"), str(tmp_path / "a"), "conditional", "float32", 8)
    with pytest.raises(ValueError, match="noisy captions differ"):
        cache(command(work, "u", diffusion_prompt="noisy_caption"), str(tmp_path / "b"), "conditional", "float32", 8)
    with pytest.raises(FileNotFoundError, match=f"{RECORD} is missing"):
        FeatureCache(tmp_path)


def test_differences_are_named():
    found = {"a": 1, "b": {"c": 2, "d": 3}}
    assert list(differences(found, {"a": 1, "b": {"c": 2, "d": 4}})) == ["its b.d is 3, the run's is 4"]
