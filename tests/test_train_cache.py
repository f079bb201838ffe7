"""Cached features: equal to computed ones, resumable, shared, and rejected where they do not fit."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from train_fixtures import command, losses, model_arguments, weights

from sdllava.data.sources import DataSource, load_data
from sdllava.train.arguments import ModelArguments
from sdllava.train.build import build_model, build_processor, read_source
from sdllava.train.cache import RECORD, CacheEntry, FeatureCache, begin_cache, cache_kind, image_key, write_shards
from sdllava.train.cache_writer import _earlier_fingerprint, write_cache
from sdllava.train.collator import SDLlavaCollator
from sdllava.train.run import build_collator, cache, check_cache, parse_run, train

FIXED = {"fixed_noise": "true"}
SGD = {"optim": "sgd", "learning_rate": 0.5}  # Adam turns rounding into whole steps where a gradient is nearly zero
CASES = {
    "latents": ({}, ["latents"]),
    "vision": (FIXED, ["vision_features", "unconditional_features", "latents"]),
    "vision-align": (
        {**FIXED, "diffusion_prompt": "none", "stage": "align"},
        ["vision_features", "unconditional_features"],
    ),
    "conditional": (
        {**FIXED, "prompt_dropout": 0.5},
        ["vision_features", "unconditional_features", "conditional_features"],
    ),
}


@pytest.fixture(scope="module")
def model(work):
    """The model of `command`; tests change it only within themselves."""
    model = build_model(read_source(ModelArguments(init_from=str(work / "trained"))))
    torch.nn.init.normal_(model.model.fusion.out_proj.weight)  # so that the diffusion features reach the answer
    return model.eval()


@pytest.fixture(scope="module")
def processor(work):
    return build_processor(read_source(model_arguments(work)))


@pytest.fixture(scope="module")
def rows(work):
    return load_data([DataSource(str(work / "data" / "colours.json"))])


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def collators(work: Path, processor, folder: Path | None, **flags) -> SDLlavaCollator:
    """The collator of a run, with a cache or without."""
    collator = build_collator(parse_run(command(work, "unused", **flags)), copy.deepcopy(processor))
    collator.cache = folder and FeatureCache(folder)
    return collator


def loss_and_gradients(model, batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    trained = ("model.fusion.", "model.multi_modal_projector.", "model.language_model.")
    found = {name: p.grad.clone() for name, p in model.named_parameters() if name.startswith(trained)}
    return {"loss": loss.detach(), **found}


@pytest.mark.parametrize("case", CASES)
def test_cached_features_give_the_computed_loss_and_gradients(work, model, processor, rows, tmp_path, case):
    flags, names = CASES[case]
    plain = collators(work, processor, None, **flags)
    written = write_cache(model, plain, rows, tmp_path, case.partition("-")[0], "float32", 4)
    assert written == (20 if case == "conditional" else 10)
    cached = collators(work, processor, tmp_path, **flags)
    assert cached.cache.record["tensors"] == names
    assert len(cached.cache) == written
    check_cache(cached.cache, cached, model, trains_diffusion=False)
    batches = [collator([rows[i] for i in range(4)]) for collator in (plain, cached)]
    assert "image_encodings" in batches[1]
    assert "diffusion_pixel_values" not in batches[1]
    expected, found = (loss_and_gradients(model, batch) for batch in batches)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["latents", "conditional"])
def test_cached_training_equals_uncached(work, case):
    flags = {**CASES[case][0], **SGD, "init_from": work / "trained"}
    folder = work / f"cache-{case}"
    cache(command(work, "unused", **flags), str(folder), case.partition("-")[0], "float32", 4)
    train(command(work, f"{case}-slow", **flags))
    train(command(work, f"{case}-fast", feature_cache=folder, **flags))
    assert losses(work / f"{case}-fast") == pytest.approx(losses(work / f"{case}-slow"), abs=1e-5)
    expected = weights(work / f"{case}-slow")
    for name, tensor in weights(work / f"{case}-fast").items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=0, msg=name)


@pytest.mark.slow
def test_a_half_precision_cache_is_written_and_used_by_the_commands(work, tmp_path, capsys):
    flags = {**FIXED, "init_from": work / "trained"}
    assert cache(command(work, "unused", **flags), str(tmp_path), "vision", "bfloat16", 4) == 10
    assert "10 keys of 2.5 KiB, 0.000 GiB in total; 10 left for process 0 of 1" in capsys.readouterr().out
    train(command(work, "half", feature_cache=tmp_path, max_steps=1, save_strategy="no", **flags))
    assert {tensor.dtype for tensor in tensors(tmp_path).values()} == {torch.bfloat16}


def test_a_sample_that_the_cache_left_out_is_bad_in_training(work, tmp_path, capsys):
    """Without a vision tower no image is opened in training, so only the cache can tell."""
    samples = json.loads((work / "data" / "colours.json").read_text())[:4]
    (work / "data" / "images" / "broken.png").write_bytes(b"x")
    samples[1]["image"] = "images/broken.png"
    data = work / "data" / "broken.json"
    data.write_text(json.dumps(samples))
    arguments = model_arguments(work, vision=None, fusion_num_attention_heads=None)
    source = read_source(arguments)
    model, processor = build_model(source), build_processor(source)
    rows = load_data([DataSource(str(data))])
    plain = SDLlavaCollator(processor, skip_bad_samples=True, fixed_noise=True)
    assert write_cache(model, plain, rows, tmp_path, "latents", "float32", 8) == 3
    assert "1 of 4 samples were skipped, because they cannot be used" in capsys.readouterr().out
    strict = SDLlavaCollator(processor, skip_bad_samples=True, max_bad_samples=0.0, fixed_noise=True)
    with pytest.raises(ValueError, match=r"1 of 4 samples were skipped because they cannot be used, more than 0\.00%"):
        write_cache(model, strict, rows, tmp_path / "strict", "latents", "float32", 8)
    cached = SDLlavaCollator(processor, skip_bad_samples=True, fixed_noise=True, cache=FeatureCache(tmp_path))
    batches = [collator([rows[i] for i in range(4)]) for collator in (plain, cached)]
    assert torch.equal(batches[0]["labels"], batches[1]["labels"])
    with torch.no_grad():
        expected, found = (model(**batch).loss for batch in batches)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    cached.skip_bad_samples = False
    with pytest.raises(ValueError, match=r"broken\.json:1 sample 1 has the image 'images/broken\.png', which the feat"):
        cached([rows[1]])


@pytest.fixture(scope="module")
def align_cache(work, model, processor, rows, tmp_path_factory) -> Path:
    """A cache without latents, for stage align."""
    folder = tmp_path_factory.mktemp("cache")
    write_cache(
        model, collators(work, processor, None, **CASES["vision-align"][0]), rows, folder, "vision", "float32", 8
    )
    return folder


@pytest.mark.parametrize(
    ("flags", "fields", "trains_diffusion", "reason"),
    [
        ({"fixed_noise": "false"}, {}, False, "Set fixed_noise: true"),
        ({}, {"timesteps": [100]}, False, r"timesteps is \[50\] there and \[100\] here"),
        ({}, {"noise_seed": 3}, False, "noise_seed is 0 there and 3 here"),
        ({}, {"grid_size": 2}, False, "grid_size is 4 there and 2 here"),
        ({}, {}, True, "trains what computes them"),
        ({"diffusion_prompt": "question"}, {}, False, "Set diffusion_prompt: none"),
    ],
)
def test_a_cache_that_does_not_fit_the_run_raises(
    work, model, processor, align_cache, monkeypatch, flags, fields, trains_diffusion, reason
):
    for name, value in fields.items():
        monkeypatch.setattr(model.config.diffusion_config, name, value)
    collator = collators(work, processor, align_cache, **{**CASES["vision-align"][0], **flags})
    with pytest.raises(ValueError, match=reason):
        check_cache(collator.cache, collator, model, trains_diffusion)


def test_a_cache_of_other_weights_raises(work, model, processor, rows, align_cache, tmp_path):
    other = copy.deepcopy(model)
    for parameter in other.model.diffusion_tower.vae.parameters():
        parameter.data += 0.1
    collator = collators(work, processor, align_cache, **CASES["vision-align"][0])
    with pytest.raises(ValueError, match=r"weights\.vae is"):
        check_cache(collator.cache, collator, other, False)
    shutil.copytree(align_cache, tmp_path / "cache")
    with pytest.raises(ValueError, match=r"weights\.vae is"):
        write_cache(other, collator, rows, tmp_path / "cache", "vision", "float32", 8)


def test_training_checks_its_cache(work, align_cache):
    flags = {"diffusion_prompt": "none", "stage": "align", "init_from": work / "trained"}
    with pytest.raises(ValueError, match="Set fixed_noise: true"):
        train(command(work, "unfit", feature_cache=align_cache, **flags))


def test_a_cache_of_an_earlier_version_is_read_and_resumed(work, model, processor, rows, align_cache, tmp_path):
    """Its kind is called static, and its fingerprints have 16 digits."""
    folder = tmp_path / "cache"
    shutil.copytree(align_cache, folder)
    record = json.loads((folder / RECORD).read_text())
    tower = model.model.diffusion_tower
    modules = {"vae": tower.vae, "unet": tower.unet, "text_encoder": tower.text_encoder}
    modules["vision_tower"] = model.model.vision_tower
    record |= {"kind": "static", "weights": {name: _earlier_fingerprint(module) for name, module in modules.items()}}
    (folder / RECORD).write_text(json.dumps(record))
    collator = collators(work, processor, folder, **CASES["vision-align"][0])
    assert collator.cache.kind == "vision"
    check_cache(collator.cache, collator, model, False)
    next(folder.glob("*.safetensors")).unlink()
    assert write_cache(model, collator, rows, folder, "static", "float32", 8) == 10
    record["weights"]["vae"] = "0" * 16
    (folder / RECORD).write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"weights\.vae is '0000000000000000' there"):
        check_cache(FeatureCache(folder), collator, model, False)


def test_an_interrupted_cache_resumes(tmp_path):
    record = {"kind": "latents", "tensors": ["latents"]}
    items = [CacheEntry(image_key(str(i)), {"latents": torch.full((4,), float(i))}) for i in range(6)]

    def interrupted():
        yield from ([item] for item in items[:4])
        raise KeyboardInterrupt

    begun = begin_cache(tmp_path, record, "checkpoint")
    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path, interrupted(), shard_bytes=48)
    begun = begin_cache(tmp_path, record, "a copy of the checkpoint")
    assert (len(begun), begun.record["model"]) == (3, "checkpoint")
    write_shards(tmp_path, [[item] for item in items if item[0] not in begun], shard_bytes=48)
    whole = FeatureCache(tmp_path)
    assert len(whole) == 6
    for key, expected, _ in items:
        assert torch.equal(whole.read(key)["latents"], expected["latents"])
    with pytest.raises(ValueError, match="kind is 'latents' there and 'vision' here"):
        begin_cache(tmp_path, {**record, "kind": "vision"}, "checkpoint")
    with pytest.raises(ValueError, match="from the run's data"):
        whole.read(image_key("none"))


def test_what_a_killed_write_left_does_not_count(tmp_path):
    begin_cache(tmp_path, {"kind": "latents", "tensors": ["latents"]}, "checkpoint")
    (tmp_path / ".host-1-0000-a.safetensors").write_bytes(b"half")
    assert len(FeatureCache(tmp_path)) == 0


def test_another_image_with_the_same_name_raises(work, model, processor, rows, tmp_path):
    """Both where a cache is extended and where it is used."""
    write_cache(model, collators(work, processor, None), rows, tmp_path / "cache", "latents", "float32", 8)
    shutil.copytree(work / "data", tmp_path / "data")
    (tmp_path / "data" / "images" / "1.png").write_bytes((work / "data" / "images" / "0.png").read_bytes())
    others = load_data([DataSource(str(tmp_path / "data" / "colours.json"))])
    reason = r"'images/1\.png' of \d+ bytes in .*, but the features in .* are of a file of \d+ bytes"
    with pytest.raises(ValueError, match=reason):
        write_cache(model, collators(work, processor, None), others, tmp_path / "cache", "latents", "float32", 8)
    collator = collators(work, processor, tmp_path / "cache")
    assert "image_encodings" in collator([others[0]])
    with pytest.raises(ValueError, match=reason):
        collator([others[1]])


def test_only_missing_keys_are_computed(model, processor, rows, tmp_path):
    collator = SDLlavaCollator(processor)
    assert write_cache(model, collator, rows, tmp_path, "latents", "float32", 3) == 10
    before = tensors(tmp_path)
    next(tmp_path.glob("*.safetensors")).unlink()
    assert write_cache(model, collator, rows, tmp_path, "latents", "float32", 3) == 10
    assert write_cache(model, collator, rows, tmp_path, "latents", "float32", 3) == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(tmp_path).items())


def test_a_late_process_computes_its_own_part(model, processor, rows, tmp_path):
    """The first process has written its shards before the second starts."""
    for process in (0, 1):
        count = write_cache(
            model, SDLlavaCollator(processor), rows, tmp_path, "latents", "float32", 3, process, num_processes=2
        )
        assert count == 5
    assert len(FeatureCache(tmp_path)) == 10


@pytest.mark.slow
def test_processes_share_the_work(work, tmp_path):
    arguments = command(work, "unused", init_from=work / "trained")
    both = tmp_path / "both"

    def write() -> None:
        assert cache(arguments, str(both), "latents", "float32", 3) == 5

    run_ranks(write, tmp_path)
    cache(arguments, str(tmp_path / "one"), "latents", "float32", 3)
    shared, single = tensors(both), tensors(tmp_path / "one")
    assert shared.keys() == single.keys()
    for name, tensor in shared.items():
        torch.testing.assert_close(tensor, single[name], atol=1e-5, rtol=0)


def test_caches_without_a_use_raise(work, model, processor, rows, tmp_path):
    def write(prompt: str, kind: str = "conditional") -> None:
        collator = collators(work, processor, None, diffusion_prompt=prompt)
        write_cache(model, collator, rows, tmp_path / "cache", kind, "float32", 8)

    with pytest.raises(ValueError, match="Write a cache of kind 'vision'"):
        write("none")
    with pytest.raises(ValueError, match="noisy captions differ"):
        write("noisy_caption")
    with pytest.raises(ValueError, match=r"Unknown kind of cache 'pixels'\. Use one of 'latents', 'vision'"):
        write("question", "pixels")
    with pytest.raises(FileNotFoundError, match=f"{RECORD} is missing"):
        FeatureCache(tmp_path)
    (tmp_path / RECORD).write_text("{")
    with pytest.raises(ValueError, match=r"record\.json' is damaged"):
        FeatureCache(tmp_path)
    assert cache_kind("static") == "vision"
