"""Matching scores against a direct computation on the stock UNet, and what their options change."""

import csv
import functools
import json
import sys
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fixtures_evaluation import make_image, write_winoground
from PIL import Image
from safetensors.torch import save_model

from sdllava.evaluation.benchmarks.matching_base import MatchingItem
from sdllava.evaluation.compare import compare
from sdllava.evaluation.match import load_matcher, match, tabulate
from sdllava.evaluation.matching import READINGS, DiffusionMatcher, MatchingOptions, published_timesteps
from sdllava.evaluation.matching_scores import attention_taps
from sdllava.evaluation.plots import plot_parts
from sdllava.fingerprints import weights_hash

IMAGES = [make_image(1, (40, 30)), make_image(2, (24, 50))]
TEXTS = ["a red dog", "two cats on a mat"]


def test_timesteps_are_the_papers():
    assert published_timesteps(5) == [189, 389, 589, 789, 989]
    assert published_timesteps(10) == list(range(89, 990, 100))
    with pytest.raises(ValueError, match=r"0 timesteps are outside the released rule. Use a number in 1\.\.100"):
        published_timesteps(0)


@functools.cache
def tower(folder):
    loaded = load_matcher(str(folder), MatchingOptions())
    return loaded.tower, loaded.tokenizers


def matcher(published, kind="sd2", batch_size=8, **options):
    options = MatchingOptions(**{"timesteps": (89, 489), "trials": 2, **options})
    return DiffusionMatcher(*tower(published[kind]), options, batch_size)


@functools.cache
def stock(folder):
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    return {
        "unet": UNet2DConditionModel.from_pretrained(folder / "unet"),
        "vae": AutoencoderKL.from_pretrained(folder / "vae"),
        "tokenizer": CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        "encoder": CLIPTextModel.from_pretrained(folder / "text_encoder"),
        "scheduler": DDPMScheduler.from_pretrained(folder / "scheduler"),
    }


def stock_pass(parts, image, text, timestep, noise, posterior_noise, layers):
    """Logits of each layer, `(2, heads, pixels, 77)`, and errors `(2,)` of the noise and of the velocity.

    One pass of the stock UNet over [empty, text].
    """
    unet, vae = parts["unet"], parts["vae"]
    size = 8 * unet.config.sample_size
    pixels = torch.tensor(np.asarray(image.resize((size, size), 1))).permute(2, 0, 1)[None] / 127.5 - 1
    read, handles = {}, []
    for path, name in product(layers, ("to_q", "to_k")):
        module = unet.get_submodule(f"{path}.{name}")
        handles.append(module.register_forward_hook(lambda m, a, o, key=(path, name): read.update({key: o})))
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
        latents = (posterior.mean + posterior.std * posterior_noise) * vae.config.scaling_factor
        noisy = parts["scheduler"].add_noise(latents, noise[None], torch.tensor([timestep]))
        ids = parts["tokenizer"](
            ["", text], padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        ).input_ids
        output = unet(torch.cat([noisy, noisy]), timestep, parts["encoder"](ids).last_hidden_state).sample
    for handle in handles:
        handle.remove()
    logits = []
    for path in layers:
        heads = unet.get_submodule(path).heads
        q, k = (read[path, name].double().numpy() for name in ("to_q", "to_k"))
        q, k = (x.reshape(*x.shape[:2], heads, -1) for x in (q, k))
        logits.append(np.einsum("bphd,bkhd->bhpk", q, k) / np.sqrt(q.shape[-1]))
    velocity = parts["scheduler"].get_velocity(latents, noise[None], torch.tensor([timestep]))
    return logits, (noise - output).flatten(1).double().numpy(), (velocity - output).flatten(1).double().numpy()


def released_code(passes, unconditional=True, bias=False):
    """The released code's score of one timestep."""
    ((logits, errors, _),) = passes
    pooled = [np.log(np.exp(layer).sum(-1)) for layer in logits]
    norms = np.linalg.norm(errors, axis=1)
    attention = np.mean([(layer if unconditional else layer[1]).mean() for layer in pooled])
    return attention + (norms[0] - norms[1] if bias else 0)


def relative(passes):
    ((logits, _, _),) = passes
    pooled = [np.log(np.exp(layer).sum(-1)).mean(axis=(1, 2)) for layer in logits]
    return np.mean([layer[1] - layer[0] for layer in pooled])


def summed_maps(passes, unconditional=True):
    """S3's score: maps of both timesteps and all layers, at a quarter of the 8x8 latents."""
    total = np.zeros((2, 77, 2, 2))
    for logits, _, _ in passes:
        for layer in logits:
            maps = (np.exp(layer) / np.exp(layer).sum(-1, keepdims=True)).mean(axis=1)  # (2, pixels, 77)
            side = int(np.sqrt(maps.shape[1]))
            maps = maps.transpose(0, 2, 1).reshape(2, 77, side, side)
            block = side // 2
            total += maps.reshape(2, 77, 2, block, 2, block).mean(axis=(3, 5)) if block else maps
    pooled = np.log(np.exp(total).sum(axis=(1, 2, 3)))
    return pooled.mean() if unconditional else pooled[1]


def denoising(passes, velocity=False):
    ((_, noise, of_velocity),) = passes
    squares = ((of_velocity if velocity else noise) ** 2).mean(axis=1)
    return squares[0] - squares[1]


LAST = [
    "down_blocks.2.attentions.0.transformer_blocks.0.attn2",
    "down_blocks.2.attentions.1.transformer_blocks.0.attn2",
    "mid_block.attentions.0.transformer_blocks.0.attn2",
    "up_blocks.3.attentions.0.transformer_blocks.0.attn2",
    "up_blocks.3.attentions.1.transformer_blocks.0.attn2",
    "up_blocks.3.attentions.2.transformer_blocks.0.attn2",
]
"""The released code's six layers of Stable Diffusion 1.x and 2.x."""


def every_layer(folder):
    return [name for name, _ in stock(folder)["unet"].named_modules() if name.endswith("attn2")]


@pytest.mark.parametrize(
    ("kind", "options", "layers", "formula"),
    [
        ("sd2", {}, LAST, released_code),
        pytest.param("sd1", {}, LAST, released_code, marks=pytest.mark.slow),
        ("sd2", {"unconditional": False}, LAST, functools.partial(released_code, unconditional=False)),
        ("sd2", {"bias": True}, LAST, functools.partial(released_code, bias=True)),
        ("sd2", {"layers": ("U-L1-R1-B0-Cross-Q",)}, ["up_blocks.1.attentions.1.transformer_blocks.0.attn2"], None),
        ("sd2", {"score": "attention-relative"}, LAST, relative),
        ("sd2", READINGS["s4"], "all", released_code),
        ("sd2", READINGS["s3"], "all", summed_maps),
        ("sd2", {**READINGS["s3"], "unconditional": False}, "all", functools.partial(summed_maps, unconditional=False)),
        ("sd2", {"score": "denoising"}, [], denoising),
    ],
)
def test_equal_to_a_hand_written_formula(published, kind, options, layers, formula):
    ours, parts = matcher(published, kind, **options), stock(published[kind])
    scores = ours.score(IMAGES, TEXTS)
    is_summed, is_denoising = options.get("pooling") == "maps", options.get("score") == "denoising"
    assert scores.shape == (2, 1 if is_summed else 2, 2, 2)
    assert ours.timesteps == (() if is_summed else (89, 489))
    assert ours.model is ours.tower
    generator = torch.Generator().manual_seed(1)  # of the second trial
    size = ours.tower.config.image_size // 8
    posterior_noise = torch.randn((4, size, size), generator=generator) * (not is_denoising)
    noises = [torch.randn((4, size, size), generator=generator) for _ in (89, 489)]
    layers = every_layer(published[kind]) if layers == "all" else layers
    for position, text, image in ((0, 0, 1), (1, 1, 0), (1, 1, 1)):
        passes = [
            stock_pass(parts, IMAGES[image], TEXTS[text], (89, 489)[k], noises[k], posterior_noise, layers)
            for k in ((0, 1) if is_summed else (position,))
        ]
        expected = (formula or released_code)(passes)
        found = scores[1, 0 if is_summed else position, text, image]
        assert found == pytest.approx(expected, abs=1e-6 if is_denoising else 2e-5)


@pytest.mark.parametrize("options", [{"score": "denoising"}, {"bias": True}])
def test_v_prediction(published, monkeypatch, options):
    """The denoising error is the velocity's; the bias is a distance of noise, sqrt(abar) times the velocity's."""
    ours, parts = matcher(published, timesteps=(489,), trials=1, **options), stock(published["sd2"])
    config = ours.tower.config
    monkeypatch.setattr(config, "scheduler_config", {**config.scheduler_config, "prediction_type": "v_prediction"})
    found = ours.score(IMAGES[:1], TEXTS[:1])[0, 0, 0, 0]
    plain = matcher(published, timesteps=(489,), trials=1)
    generator = torch.Generator().manual_seed(0)
    posterior, noise = (torch.randn((4, 8, 8), generator=generator) for _ in range(2))
    is_bias = "bias" in options
    passes = [stock_pass(parts, IMAGES[0], TEXTS[0], 489, noise, posterior * is_bias, LAST)]
    if is_bias:
        norms = np.linalg.norm(passes[0][2], axis=1) * ours.tower.backbone.noise_rates(489)[0]
        attention = plain.score(IMAGES[:1], TEXTS[:1])[0, 0, 0, 0]
        assert found == pytest.approx(attention + norms[0] - norms[1], abs=2e-5)
    else:
        assert found == pytest.approx(denoising(passes, velocity=True), abs=1e-6)


def test_layers(published):
    whole = matcher(published).tower
    assert [tap.module_path.removesuffix(".to_q") for tap in attention_taps(whole, "last")] == LAST
    assert len(attention_taps(whole, "all")) == 16
    with pytest.raises(ValueError, match="The nearest are"):
        attention_taps(whole, ("U-L9-R9-B9-Cross-Q",))
    with pytest.raises(ValueError, match=r"'U-L1-R1-B0-Out' is not a query of an attention to text\. Use Cross"):
        attention_taps(whole, ("U-L1-R1-B0-Out",))
    with pytest.raises(ValueError, match="Unknown layers 'first'"):
        attention_taps(whole, "first")


def test_sdxl_reads_the_last_transformer_block_of_each_attention(published):
    xl = matcher(published, "sdxl", timesteps=(489,), trials=1)
    assert [name for name in xl.layers if name.startswith("M")] == ["M-L0-R0-B2-Cross-Q"]
    assert np.isfinite(xl.score(IMAGES, TEXTS)).all()


@pytest.mark.parametrize("options", [{"bias": True}, {"tokens": "text", "unconditional": False}, READINGS["s3"]])
def test_independent_of_batch_size_and_of_the_other_images_and_texts(published, options):
    options = {"timesteps": (489,), "trials": 1, **options}
    together = matcher(published, batch_size=32, **options)
    whole = together.score(IMAGES, TEXTS)
    single = matcher(published, batch_size=1, **options)
    np.testing.assert_allclose(single.score(IMAGES, TEXTS), whole, atol=2e-5)
    only_one = single.score([IMAGES[1]], [TEXTS[1]])
    np.testing.assert_allclose(only_one[..., 0, 0], whole[..., 1, 1], atol=2e-5)
    np.testing.assert_array_equal(together.score(IMAGES, TEXTS), whole)


def test_masks_and_trials_change_the_score(published):
    scores = {
        mask: matcher(published, tokens=mask, unconditional=False, timesteps=(489,)).score(IMAGES, TEXTS)
        for mask in ("all", "no_padding", "text")
    }
    # fewer keys, smaller sums
    assert (scores["all"] > scores["no_padding"]).all()
    assert (scores["no_padding"] > scores["text"]).all()
    assert np.abs(scores["all"][0] - scores["all"][1]).max() > 1e-5
    later = matcher(published, seed=1, trials=1, unconditional=False, timesteps=(489,)).score(IMAGES, TEXTS)
    np.testing.assert_array_equal(later[0], scores["all"][1])  # trial k of seed s is trial 0 of seed s + k


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"tokens": "bos"}, "Unknown token mask 'bos'. Choose one of all, no_padding, text"),
        ({"tokens": "text"}, "leaves no tokens of the empty prompt. Add --no-unconditional"),
        ({"tokens": "text", "score": "attention-relative"}, "which attention-relative needs. Use --tokens no_padding"),
        ({"score": "clip"}, "Unknown score 'clip'. Choose one of attention, attention-relative, denoising"),
        ({"pooling": "max"}, "Unknown pooling 'max'. Choose one of logits, maps"),
        ({"score": "denoising", "bias": True}, "Leave out --bias, or use --score attention"),
        ({"timesteps": (1000,)}, r"Timestep 1000 is outside the training schedule. Use a value in 0\.\.999"),
        ({"trials": 0}, "Matching with 0 trials and 5 timesteps is empty. Use at least one of each"),
    ],
)
def test_bad_options(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        MatchingOptions(**options)


def test_a_truncated_tower_cannot_match():
    with pytest.raises(ValueError, match=r"truncated, .*truncate=False"):
        DiffusionMatcher(SimpleNamespace(config=SimpleNamespace(truncate=True)), [])


def test_transparent_images_are_laid_on_white(published):
    pixels = np.zeros((16, 16, 4), dtype=np.uint8)
    pixels[:, :8] = (200, 30, 30, 255)
    white = np.full((16, 16, 3), 255, dtype=np.uint8)
    white[:, :8] = (200, 30, 30)
    ours = matcher(published)
    with torch.inference_mode():
        (mean, _), (expected, _) = (ours._encode([Image.fromarray(p)]) for p in (pixels, white))
    torch.testing.assert_close(mean, expected, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------------- the run


def write_mmvp_vlm(folder, pairs=17):
    images = folder / "MLLM_VLM Images" / "T"
    images.mkdir(parents=True)
    with (folder / "Questions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Question ID", "Type", "Statement"])
        for number in range(1, 2 * pairs + 1):
            writer.writerow([number, "T", f"dog number {number}"])
            make_image(number, (16, 16)).save(images / f"{number}.jpg")
    return folder


class RandomMatcher:
    """Scores drawn from the texts, and a record of the calls."""

    layers = ["some.layer"]

    def __init__(self, options):
        self.model = torch.nn.Linear(1, 1)
        self.options, self.timesteps, self.calls, self.limit = options, options.timesteps, [], None

    def score(self, images, texts):
        if self.limit is not None and len(self.calls) >= self.limit:
            raise KeyboardInterrupt
        self.calls.append(list(texts))
        generator = np.random.default_rng(list("".join(texts).encode()))
        return generator.normal(size=(self.options.trials, len(self.timesteps), len(texts), len(images)))


def test_match_tabulates_timesteps_ensemble_and_spread(tmp_path):
    write_winoground(tmp_path / "data")
    ours = RandomMatcher(MatchingOptions(timesteps=(89, 489), trials=2))
    results = match(ours, "winoground", tmp_path / "out", {"id": "tiny"}, ours.options, str(tmp_path / "data"))
    assert set(results["timesteps"]) == {"t = 89", "t = 489"}
    assert results["trials"] == 2
    assert set(results["spread"]) == {"text", "image", "group"}
    assert results["matching"]["layers_read"] == ours.layers
    records = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    scores = np.array([record["scores"] for record in records])
    assert scores.shape == (3, 2, 2, 2, 2)
    s = scores.mean(axis=2)
    text = (s[:, :, 0, 0] > s[:, :, 1, 0]) & (s[:, :, 1, 1] > s[:, :, 0, 1])
    assert results["scores"]["text"] == pytest.approx(100 * text.mean())
    own = s[:, :, 0, 0] + s[:, :, 1, 1] > s[:, :, 0, 1] + s[:, :, 1, 0]
    assert results["own_pairs"]["score"] == pytest.approx(100 * own.mean())
    assert results["own_pairs"]["interval"][0] <= 100 * own.mean() <= results["own_pairs"]["interval"][1]
    assert results["spread"]["text"] == pytest.approx(100 * text.mean(axis=0).std(ddof=1))
    assert json.loads((tmp_path / "out" / "results.json").read_text())["scores"] == results["scores"]


def test_spread_is_that_of_the_papers():
    """S3's Table 6 prints 31.1 +- 7.70 for three draws out of 15 pairs: 40, 26.67, 26.67 with n - 1."""
    from sdllava.evaluation.benchmarks.mmvp_vlm import MMVPVLM, PATTERNS

    items = [MatchingItem(str(k), (None, None), ("", ""), {"pattern": PATTERNS[0]}) for k in range(15)]
    right, wrong = [[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]]
    records = [
        {"id": str(k), "pattern": PATTERNS[0], "scores": [[right if k < n else wrong] for n in (6, 4, 4)]}
        for k in range(15)
    ]
    table = tabulate(MMVPVLM(), items, records, (489,))
    assert round(table["scores"][PATTERNS[0]], 1) == 31.1
    assert round(table["spread"][PATTERNS[0]], 2) == 7.70
    assert table["intervals_95"]["average"][0] < 31.1 < table["intervals_95"]["average"][1]


def test_ten_timesteps_also_have_the_papers_ensemble():
    from sdllava.evaluation.benchmarks.winoground import Winoground

    generator = np.random.default_rng(0)
    items = [MatchingItem(str(k), (None, None), ("", "")) for k in range(40)]
    scores = generator.normal(size=(40, 2, 10, 2, 2))
    records = [{"id": item.id, "scores": s.tolist()} for item, s in zip(items, scores, strict=True)]
    table = tabulate(Winoground(), items, records, published_timesteps(10))
    assert len(table["timesteps"]) == 11
    five = tabulate(
        Winoground(),
        items,
        [{"id": r["id"], "scores": s[:, 1::2].tolist()} for r, s in zip(records, scores, strict=True)],
        published_timesteps(5),
    )
    assert table["timesteps"]["the papers' ensemble"]["mean"] == five["scores"] != table["scores"]


def test_match_resumes(tmp_path):
    write_mmvp_vlm(tmp_path / "data")
    ours = RandomMatcher(MatchingOptions(timesteps=(489,), trials=1))
    args = ("mmvp_vlm", tmp_path / "out", {"id": "tiny"}, ours.options, str(tmp_path / "data"))
    ours.limit = 10
    with pytest.raises(KeyboardInterrupt):
        match(ours, *args)
    assert ours.calls[0] == ["a photo of dog number 1", "a photo of dog number 2"]
    ours.limit = None
    results = match(ours, *args)
    assert len(ours.calls) == 17
    assert len(set(map(tuple, ours.calls))) == 17
    assert set(results["scores"]) == {"average", "Orientation and Direction", "Presence of Specific Features"}
    (comparison,) = compare([tmp_path / "out"])
    assert comparison.headline == ["average"]
    assert comparison.parts == ["Orientation and Direction", "Presence of Specific Features"]
    assert {row.source for row in comparison.published} == {"S3 Table 1", "S3 Table 6"}
    plot_parts(comparison, tmp_path / "patterns.png")
    assert (tmp_path / "patterns.png").stat().st_size > 10000


@pytest.mark.parametrize("changed", ["weights", "text", "image"])
def test_match_does_not_resume_with_other_weights_texts_or_images(tmp_path, changed):
    write_mmvp_vlm(tmp_path / "data")
    ours = RandomMatcher(MatchingOptions(timesteps=(489,), trials=1))
    args = ("mmvp_vlm", tmp_path / "out", {"id": "tiny"}, ours.options, str(tmp_path / "data"))
    match(ours, *args)
    assert match(ours, *args)["model"].keys() == {"id", "weights"}
    assert len(ours.calls) == 17
    messages = {
        "weights": r"model\.weights is '\w+' there",
        "text": r"data\.fingerprint is",
        "image": "images of the sample",
    }
    if changed == "weights":
        torch.nn.init.ones_(ours.model.weight)
    elif changed == "text":
        table = tmp_path / "data" / "Questions.csv"
        table.write_text(table.read_text().replace("dog number 4", "cat number 4"))
    else:
        make_image(99, (16, 16)).save(tmp_path / "data" / "MLLM_VLM Images" / "T" / "4.jpg")
    with pytest.raises(ValueError, match=messages[changed]):
        match(ours, *args)


def test_clip_and_siglip_of_transformers(published, tmp_path):
    from transformers import (
        CLIPConfig,
        CLIPImageProcessorPil,
        CLIPModel,
        CLIPProcessor,
        CLIPTokenizer,
    )

    tokenizer = CLIPTokenizer.from_pretrained(published["sd1"] / "tokenizer")
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**text, "image_size": 16, "patch_size": 8}
    config = CLIPConfig(
        text_config={**text, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}, vision_config=vision
    )
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    processor = CLIPProcessor(CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16), tokenizer)
    processor.save_pretrained(tmp_path / "clip")
    ours = load_matcher(str(tmp_path / "clip"), MatchingOptions())
    scores = ours.score(IMAGES, TEXTS)
    assert scores.shape == (1, 1, 2, 2)
    model = CLIPModel.from_pretrained(tmp_path / "clip")
    inputs = processor(text=[TEXTS[1]], images=[IMAGES[0]], return_tensors="pt")
    assert scores[0, 0, 1, 0] == pytest.approx(model(**inputs).logits_per_image.item(), abs=1e-4)
    transparent = Image.fromarray(np.zeros((16, 16, 4), dtype=np.uint8))
    white = Image.new("RGB", (16, 16), "white")
    np.testing.assert_array_equal(ours.score([transparent], TEXTS), ours.score([white], TEXTS))
    write_winoground(tmp_path / "data")
    results = match(ours, "winoground", tmp_path / "out", {"id": "clip"}, data=str(tmp_path / "data"))
    assert results["timesteps"] == {}
    assert results["spread"] is None
    assert results["matching"] is None
    assert results["model"]["weights"] == weights_hash(model)[:16]


def test_open_clip(tmp_path):
    """Scores of a tiny architecture with stored weights are cosine similarities of open_clip's own features."""
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    (tmp_path / "tiny-test.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    weights = tmp_path / "weights.safetensors"
    save_model(open_clip.create_model("tiny-test"), weights)
    ours = load_matcher(f"open_clip:tiny-test/{weights}", MatchingOptions())
    scores = ours.score(IMAGES, TEXTS)
    assert scores.shape == (1, 1, 2, 2)
    with torch.no_grad():
        pixels = torch.stack([ours.preprocess(image.convert("RGB")) for image in IMAGES])
        image, text = ours.model.encode_image(pixels), ours.model.encode_text(open_clip.tokenize(TEXTS, 16))
    expected = torch.nn.functional.cosine_similarity(text[:, None], image[None], dim=-1)
    np.testing.assert_allclose(scores[0, 0], expected.numpy(), atol=1e-5)
    with pytest.raises(ValueError, match=r"Unknown open_clip model 'open_clip:nothing'\. Use the form open_clip:ARCH"):
        load_matcher("open_clip:nothing", MatchingOptions())


@pytest.mark.parametrize("name", ["open_clip:tiny-test", "open_clip:tiny-test/"])
def test_open_clip_without_a_pretrained_tag_raises(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "open_clip", SimpleNamespace(list_models=lambda: ["tiny-test"]))
    with pytest.raises(ValueError, match=rf"'{name}'\. Use the form open_clip:ARCHITECTURE/PRETRAINED\."):
        load_matcher(name, MatchingOptions())


def test_no_model(tmp_path):
    with pytest.raises(OSError, match=r"is neither a diffusers repository .* nor a CLIP-style model"):
        load_matcher(str(tmp_path), MatchingOptions())


@pytest.mark.parametrize("limit", [0, -2])
def test_limit_below_one(tmp_path, limit):
    write_winoground(tmp_path / "data", 2)
    ours = RandomMatcher(MatchingOptions())
    with pytest.raises(ValueError, match=f"--limit {limit} is too small. Use at least 1"):
        match(ours, "winoground", tmp_path / "out", {}, data=str(tmp_path / "data"), limit=limit)
    assert not (tmp_path / "out").exists()
