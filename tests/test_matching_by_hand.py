"""Matching where the right answer is known: a UNet and a text encoder whose weights are set by hand.

The word `x` attends to bright pixels and the word `y` to dark ones. Every other token reads only the latents' second
channel, which says nothing about either word: it is the image's own level of attention.
"""

import numpy as np
import pytest
import tiny
import torch
from diffusers import FluxPipeline
from diffusers.models.embeddings import apply_rotary_emb
from PIL import Image

from sdllava import SDLlavaDiffusionModel
from sdllava.evaluation.benchmarks.matching_base import winoground_verdicts
from sdllava.evaluation.matching import READINGS, DiffusionMatcher, MatchingOptions
from sdllava.evaluation.matching_scores import attention_taps
from sdllava.taps import Tap

WIDTH = 32
UNET = {
    "sample_size": 8,
    "block_out_channels": [WIDTH],
    "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 1,
    "cross_attention_dim": WIDTH,
    "norm_num_groups": 1,
    "use_linear_projection": True,
}


def set_by_hand(tower: SDLlavaDiffusionModel, tokenizer) -> None:
    """Residual branches add nothing, so features are the latents and prompts are the tokens' own embeddings."""
    for name, weight in [*tower.unet.named_parameters(), *tower.text_encoder.named_parameters()]:
        is_norm = "norm" in name and name.endswith("weight")
        torch.nn.init.constant_(weight, 1.0 if is_norm else 0.0)
    conv = tower.unet.conv_in.weight  # brightness is features 0 and 1, the image's level is features 4 and 5
    conv[[0, 1], 0, 1, 1] = torch.tensor([1.0, -1.0])
    conv[[4, 5], 1, 1, 1] = torch.tensor([1.0, -1.0])
    for name, module in tower.unet.named_modules():
        if name.endswith("conv_shortcut"):  # keeps the features, drops those of the skip connection
            module.weight[:, :WIDTH, 0, 0] = torch.eye(WIDTH)
        elif name.endswith("proj_in"):
            module.weight.copy_(torch.eye(WIDTH))
        elif name.endswith("attn2.to_q"):
            module.weight[0, 0], module.weight[1, 4] = 3.0, 2.0
        elif name.endswith("attn2.to_k"):
            module.weight[0, 0], module.weight[1, 2] = 1.0, 1.0
    embeddings = tower.text_encoder.get_input_embeddings().weight
    embeddings[:, [2, 3]] = torch.tensor([1.0, -1.0])
    for word, sign in (("x", 1.0), ("y", -1.0)):
        _, token, *_ = tokenizer(word)["input_ids"]
        embeddings[token] = 0
        embeddings[token, [0, 1]] = torch.tensor([sign, -sign])


@pytest.fixture(scope="module")
def by_hand():
    tokenizer = tiny.diffusion_tokenizer()
    config = tiny.diffusion_config(unet_config=UNET, taps=["U-L0-R0-B0-Cross-Q"], truncate=False)
    tower = SDLlavaDiffusionModel(config).eval()
    with torch.no_grad():
        set_by_hand(tower, tokenizer)
    tower.backbone.image_distribution = lambda pixels: latents_of(pixels)
    return tower, tokenizer


def latents_of(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents whose first channel is red and the second blue, in [-1, 1] and [0, 1]; nothing is sampled."""
    red, _, blue = torch.nn.functional.adaptive_avg_pool2d(pixels, 8).unbind(dim=1)
    latents = torch.stack([red, (blue + 1) / 2, 0 * red, 0 * red], dim=1)
    return latents, torch.zeros_like(latents)


def picture(bright_columns: int, level: int = 0) -> Image.Image:
    """Eight columns of eight pixels, the first ones red, on a blue of this level."""
    pixels = np.zeros((64, 64, 3), dtype=np.uint8)
    pixels[:, : 8 * bright_columns, 0] = 255
    pixels[..., 2] = level
    return Image.fromarray(pixels)


def scores(by_hand, images, **options):
    matcher = DiffusionMatcher(*by_hand_parts(by_hand), MatchingOptions(timesteps=(10, 20), trials=1, **options))
    return matcher.score(images, ["x", "y"]).mean(axis=(0, 1))


def by_hand_parts(by_hand):
    tower, tokenizer = by_hand
    return tower, [tokenizer]


@pytest.mark.parametrize("bright_columns", [2, 6])
def test_a_word_attends_to_its_place(by_hand, bright_columns):
    tower, tokenizer = by_hand
    ids = torch.tensor(tokenizer(["x", "y"], padding="max_length", max_length=77)["input_ids"])
    pixels = torch.tensor(np.asarray(picture(bright_columns))).permute(2, 0, 1)[None].repeat(2, 1, 1, 1) / 127.5 - 1
    tower.config.timesteps = [10]
    with torch.no_grad(), tower.capture_attention() as maps:
        tower(latents=latents_of(pixels)[0], input_ids=ids, guidance_scales=[1.0])
    x, y = maps.average()[:, 1]  # the token after the begin of the prompt
    assert x[:, :bright_columns].min() > 0.9
    assert x[:, bright_columns:].max() < 1e-3
    assert y[:, :bright_columns].max() < 1e-3
    assert y[:, bright_columns:].min() > 0.9


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("score", ["attention", "attention-relative"])
def test_the_right_image_and_text_win(by_hand, reading, score):
    options = {**READINGS[reading], "score": score}
    found = scores(by_hand, [picture(6), picture(2)], **options)
    assert winoground_verdicts(found.tolist()) == {"text": True, "image": True, "group": True}


def test_the_images_own_level_hides_the_text_unless_it_is_subtracted(by_hand):
    """Why the papers' score fails on some models: one image wins with both texts."""
    images = [picture(6), picture(2, level=80)]
    plain, relative = (scores(by_hand, images, score=score) for score in ("attention", "attention-relative"))
    assert (plain[:, 1] > plain[:, 0]).all()
    assert relative[0, 0] > relative[0, 1]
    assert relative[1, 1] > relative[1, 0]


def test_only_layers_between_image_and_text_are_read(by_hand):
    assert [tap.name for tap in attention_taps(by_hand[0], "all")] == [
        "D-L0-R0-B0-Cross-Q",
        "M-L0-R0-B0-Cross-Q",
        "U-L0-R0-B0-Cross-Q",
        "U-L0-R1-B0-Cross-Q",
    ]


@pytest.mark.parametrize("score", ["denoising", "attention"])
def test_a_transformer_matches(build_once, score):
    """PixArt: the denoising error leaves out the learned variance, the attention leaves out padding."""
    from PIL.Image import effect_noise
    from tiny_families import save_pixart

    from sdllava.evaluation.match import load_matcher

    folder = build_once("pixart-matching", lambda folder: save_pixart(folder))
    options = MatchingOptions(timesteps=(489,), trials=1, score=score)
    matcher = load_matcher(str(folder), options)
    image = effect_noise((64, 64), 80).convert("RGB")
    found = matcher.score([image], ["a red dog", "a"])
    backbone = matcher.tower.backbone
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        mean, deviation = matcher._encode([image])
        posterior, noise = (torch.randn(mean.shape[1:], generator=generator) for _ in range(2))
        latents = mean + deviation * posterior * (score == "attention")
        noisy = matcher.tower.add_noise(latents, 489, noise)
        prompts, _ = matcher._prompts(["a red dog", "a"])
        if score == "denoising":
            output = [backbone.denoise(backbone.denoiser, noisy, 489, pick(prompts, k)).sample for k in range(3)]
            errors = [float((one[:, :4] - noise).square().mean()) for one in output]
            expected = [errors[2] - errors[0], errors[2] - errors[1]]
        else:
            lengths = prompts["encoder_attention_mask"].sum(dim=1)
            pooled = []
            for k in (0, 2):
                path = f"{matcher._score.taps[-1].module_path.removesuffix('to_q')}"
                taps = [Tap(path + name, path + name, 0, 0, 0) for name in ("to_q", "to_k")]
                layers = backbone.read(noisy, 489, pick(prompts, k), taps)
                queries, keys = (x.unflatten(-1, (2, 16)) for x in layers)
                logits = torch.einsum("nphd,nkhd->nhpk", queries, keys[:, : lengths[k]]) / 4
                pooled.append(float(logits.logsumexp(-1).mean()))
            expected = [sum(pooled) / 2]
    assert found[0, 0, : len(expected), 0] == pytest.approx(expected, abs=1e-5)


def pick(prompts: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    return {name: value[row : row + 1] for name, value in prompts.items()}


@pytest.fixture
def family_matcher(build_once):
    """Loads a tiny model of a family with options of the score."""
    import tiny_families

    from sdllava.evaluation.match import load_matcher

    def load(kind: str, **options) -> DiffusionMatcher:
        folder = build_once("deepfloyd_if" if kind == "if" else kind, getattr(tiny_families, f"save_{kind}"))
        found = load_matcher(str(folder), MatchingOptions(timesteps=(489,), trials=1, **options))
        found.tower.config.image_size = 64  # a 64th of the default's pixels
        return DiffusionMatcher(found.tower, found.tokenizers, found.options)

    return load


def noisy_latents(matcher: DiffusionMatcher, image, sampled: bool) -> tuple[torch.Tensor, ...]:
    """Latents, noise and noisy latents of the first draw."""
    mean, deviation = matcher._encode([image])
    generator = torch.Generator().manual_seed(0)
    posterior, noise = (torch.randn(mean.shape[1:], generator=generator) for _ in range(2))
    latents = mean + deviation * posterior if sampled else mean
    return latents, noise, matcher.tower.add_noise(latents, 489, noise)


FAMILIES = ["sd3", "flux", "if"]


@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_every_family_matches_by_denoising_error(family_matcher, kind):
    matcher, image = family_matcher(kind, score="denoising"), Image.effect_noise((40, 30), 80).convert("RGB")
    found = matcher.score([image], ["a red dog"])
    latents, noise, noisy = noisy_latents(matcher, image, sampled=False)
    prompts, _ = matcher._prompts(["a red dog"])
    backbone = matcher.tower.backbone
    target = backbone.prediction_target(latents, noise[None], 489)
    own, empty = (float((backbone.predict(noisy, 489, pick(prompts, k)) - target).square().mean()) for k in (0, 1))
    assert found.shape == (1, 1, 1, 1)
    assert found[0, 0, 0, 0] == pytest.approx(empty - own, abs=1e-5)


def keys_of_text(tap) -> str:
    return "to_k" if tap.after_text else "add_k_proj"


def stock_outputs(denoiser, taps, run) -> dict[str, torch.Tensor]:
    """What the projections of queries and of the text's keys return in a whole stock pass, by path."""
    outputs, handles = {}, []
    for tap in taps:
        attention = tap.module_path.removesuffix(".to_q")
        for path in (tap.module_path, f"{attention}.{keys_of_text(tap)}"):
            module = denoiser.get_submodule(path)
            handles.append(module.register_forward_hook(lambda m, args, out, path=path: outputs.update({path: out})))
    run()
    for handle in handles:
        handle.remove()
    return outputs


def text_logits(denoiser, tap, outputs) -> torch.Tensor:
    """Products of the image's queries and the text's keys of a layer."""
    attention = denoiser.get_submodule(path := tap.module_path.removesuffix(".to_q"))
    names = ("to_q", keys_of_text(tap))
    query, key = (outputs[f"{path}.{name}"].unflatten(2, (attention.heads, -1)) for name in names)
    norms = [getattr(attention, name, None) for name in ("norm_q", "norm_k" if tap.after_text else "norm_added_k")]
    query, key = (x if norm is None else norm(x) for x, norm in zip((query, key), norms, strict=True))
    if tap.after_text:  # text, then image
        query, key = query[:, -tap.height * tap.width :], key[:, : -tap.height * tap.width]
    if hasattr(denoiser, "pos_embed") and hasattr(denoiser.pos_embed, "axes_dim"):  # FLUX turns queries by position
        ids = FluxPipeline._prepare_latent_image_ids(1, tap.height, tap.width, "cpu", torch.float32)
        query = apply_rotary_emb(query, denoiser.pos_embed(ids), sequence_dim=1)
    return torch.einsum("nphd,nthd->nhpt", query, key) / query.shape[-1] ** 0.5


@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_every_family_matches_by_attention(family_matcher, kind):
    """Where positions attend to text and image, the score pools the keys of the text."""
    matcher, image = family_matcher(kind, unconditional=False), Image.effect_noise((40, 30), 80).convert("RGB")
    texts = ["a red dog", "b"]
    found = matcher.score([image], texts)[0, 0, :, 0]
    _, _, noisy = noisy_latents(matcher, image, sampled=True)
    prompts, _ = matcher._prompts(texts)
    backbone, taps, pooled = matcher.tower.backbone, attention_taps(matcher.tower, "last"), []
    assert (
        matcher.layers
        == {
            "sd3": ["T-B2-Joint-Q"],
            "flux": ["T-B3-Joint-Q"],
            "if": [*[f"D-L2-R{k}-B0-Cross-Q" for k in (0, 1)], "M-L0-R0-B0-Cross-Q"]
            + [f"U-L1-R{k}-B0-Cross-Q" for k in (0, 1, 2)],
        }[kind]
    )
    for row in range(2):
        run = lambda row=row: backbone.denoise(backbone.denoiser, noisy, 489, pick(prompts, row))  # noqa: E731
        outputs = stock_outputs(backbone.denoiser, taps, run)
        logits = [text_logits(backbone.denoiser, tap, outputs) for tap in taps]
        pooled.append(np.mean([float(layer.logsumexp(-1).mean()) for layer in logits]))
    np.testing.assert_allclose(found, pooled, atol=1e-5)
    summed = MatchingOptions(timesteps=(489,), trials=1, **READINGS["s3"], tokens="text", unconditional=False)
    scores = DiffusionMatcher(matcher.tower, matcher.tokenizers, summed).score([image], texts[:1])
    assert scores.shape == (1, 1, 1, 1)
    assert np.isfinite(scores).all()


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_tokens_of_each_text_encoder_are_pooled(family_matcher, kind):
    matcher = family_matcher(kind, tokens="text", unconditional=False)
    prompts, mask = matcher._prompts(["ab", "c"])
    assert mask.shape == prompts["encoder_hidden_states"].shape[:2]
    words = {"sd3": [1, 2, 77, 78], "flux": [0, 1], "if": [0, 1]}[kind]  # CLIP has a begin token, T5 has none
    assert mask[0].nonzero().flatten().tolist() == words
    assert mask[1].nonzero().flatten().tolist() == words[::2]
