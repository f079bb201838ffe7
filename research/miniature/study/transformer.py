"""The study on the diffusion transformer: taps, matching, questions, captions, and where its features leak a prompt.

S3 asks in its third open question whether the leakage of captions persists in diffusion transformers (section 7). Text
reaches the image tokens of this architecture in two ways: they attend to the text tokens in every block, and a pooled
embedding of the prompt scales and shifts them. Both can be closed without training.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from sdllava.analysis.loading import AnalysisModel, load_analysis_model
from sdllava.evaluation.benchmarks import get_matching_benchmark
from sdllava.evaluation.benchmarks.base import unit_means
from sdllava.evaluation.bootstrap import Units, intervals
from sdllava.evaluation.matching import MatchingOptions
from sdllava.evaluation.prompt_choices import derangement
from sdllava.guidance import guide
from sdllava.hooked_backbone import as_dict
from sdllava.scenes.language import caption
from sdllava.scenes.world import sample_scene
from sdllava.sd3 import T5_LENGTH

from ..mmdit import KeyBias, zero_row_bias
from . import captions, questions
from .captions import scene_colours
from .claims import claim, claim_above_zero
from .guidance import POOLED
from .matching import run_matcher
from .questions import BOTH
from .readout import auc, fit_readout, ordered_pairs
from .scales import StudyScale
from .taps import BATCH, Place, accuracies, results, scene_latents
from .training import Variant

FOLDER = "mmdit"
TIMESTEPS = (180, 420)
DEFAULT_TIMESTEP = 180
GUIDANCE = (1.0, 4.0)
DIRECTIONS = (4, 16, 64)
WHOLE, UNATTENDED, UNPOOLED = "whole", "image tokens do not attend to text", "pooled text of the empty prompt"
MODES = (WHOLE, UNATTENDED, UNPOOLED)
"""How text reaches the image tokens: in both ways, only by the pooled embedding, or only by attention."""


def taps_of(layers: int) -> list[str]:
    """The input of each block after its modulation, and the output of the last block."""
    return [*(f"T-B{block}-Norm" for block in range(layers)), f"T-B{layers - 1}-Out"]


def _layers(model: AnalysisModel) -> int:
    return as_dict(model.tower.config.transformer_config)["num_layers"]


def measure(parts: Path, work: Path, scale: StudyScale, noise_seed: int = 0) -> dict[str, Any]:
    """Read-outs by tap and timestep, as (a), and the leakage of wrong captions to read-outs, by block.

    Args:
        parts: The folder of the miniature's parts.
        work: The folder of intermediate results.
        scale: The budgets.
        noise_seed: Selects the noise map.

    Returns:
        `dict[str, Any]`: `rows`, `leakage`, `projected` and `claims`.
    """
    model = load_analysis_model(str(parts / FOLDER))
    model.tower.config.noise_seed = noise_seed
    layers = _layers(model)
    taps = taps_of(layers)
    middle = f"T-B{layers // 2}-Norm"
    trends: dict[str, tuple[Place, Place]] = {
        "read-outs are more accurate in the middle block than in the first, t = 180": (
            (taps[0], DEFAULT_TIMESTEP),
            (middle, DEFAULT_TIMESTEP),
        ),
        "read-outs are more accurate at t = 180 than at t = 420": ((middle, 420), (middle, DEFAULT_TIMESTEP)),
        "read-outs are more accurate from the middle block than from CLIP, t = 180": (
            ("CLIP", None),
            (middle, DEFAULT_TIMESTEP),
        ),
    }
    read = results(accuracies(parts, FOLDER, taps, TIMESTEPS, scale, noise_seed), trends)
    scenes = Leaking(scale)
    units, projected = _leakage(model, scenes, taps)
    return {
        "training": _checks_on_the_way(parts),
        "rows": read["rows"],
        "leakage": {" | ".join(key): scored(found) for key, found in units.items()},
        "projected": {" | ".join(key): scored(found) for key, found in projected.items()},
        "claims": [*read["claims"], *_leakage_claims(units, projected, taps)],
    }


def _checks_on_the_way(parts: Path) -> list[dict[str, float]]:
    """The checks during the transformer's training, as far as it was trained."""
    file = parts / "state" / "mmdit-checks.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


class Leaking:
    """Scenes to fit and to test read-outs, with their own captions and with those of other scenes."""

    def __init__(self, scale: StudyScale):
        counts = dict(zip(("train", "test"), scale.transformer, strict=True))
        self.scenes = {split: [sample_scene(split, seed) for seed in range(n)] for split, n in counts.items()}
        self.donors = {split: derangement(len(found), seed=0) for split, found in self.scenes.items()}
        self.colours = {split: scene_colours(found) for split, found in self.scenes.items()}

    def captions(self, split: str, wrong: bool) -> list[str]:
        """The captions of a split's scenes, or of the scenes that they are confused with."""
        own = [caption(scene) for scene in self.scenes[split]]
        return [own[donor] for donor in self.donors[split]] if wrong else own

    def leaked(self, scores: Tensor) -> Units:
        """Whether colours of the wrong caption score higher than other colours that are not in the image either."""
        in_caption, absent = self.colours["test"][self.donors["test"]], ~self.colours["test"]
        return ordered_pairs(scores, in_caption & absent, ~in_caption & absent)

    def seen(self, scores: Tensor) -> Units:
        """Whether colours of the image score higher than those that are not in it."""
        return ordered_pairs(scores, self.colours["test"], ~self.colours["test"])


def scored(found: dict[str, Units]) -> dict[str, dict[str, Any]]:
    """The AUC of each read-out, with its interval."""
    return {
        name: {"AUC": auc(unit_means(units))["AUC"], "interval": intervals(units, auc)["AUC"]}
        for name, units in found.items()
    }


def short_prompts(prompts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Prompts with one of the zero rows that take T5's place, see [`~research.miniature.mmdit.zero_row_bias`]."""
    return prompts | {"encoder_hidden_states": prompts["encoder_hidden_states"][:, : 1 - T5_LENGTH]}


def attention_bias(image_tokens: int, text_tokens: int, sees_text: bool) -> Tensor:
    """The bias `(tokens, tokens)` of an attention over image tokens, then text tokens and one zero row.

    Args:
        image_tokens: Image tokens.
        text_tokens: Text tokens without the zero row.
        sees_text: Whether image tokens attend to text.
    """
    bias = zero_row_bias(image_tokens, text_tokens)
    bias = bias.repeat(image_tokens + text_tokens + 1, 1)
    if not sees_text:
        bias[:image_tokens, image_tokens:] = -torch.inf
    return bias


@torch.no_grad()
def read_halves(
    model: AnalysisModel, latents: Tensor, texts: list[str], taps: list[str], timestep: int, mode: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """Unconditional and conditional features of each tap, averaged over quadrants, each `(n, 4, channels)`.

    Args:
        model: The transformer.
        latents: The latents `(n, 4, h, w)`.
        texts: One prompt per image.
        taps: The names of the taps.
        timestep: The timestep.
        mode: One of [`MODES`].
    """
    tower = model.tower
    chosen = [tap for tap in tower.config.all_taps() if tap.name in taps]
    given = short_prompts(model.prompts(texts) or {})
    empty = {name: x.expand_as(given[name]) for name, x in short_prompts(tower.null_prompt()).items()}
    if mode == UNPOOLED:
        given["pooled_projections"] = empty["pooled_projections"]
    joined = {name: torch.cat([empty[name], given[name]]) for name in given}
    noisy = tower.denoiser_input(latents, timestep, tower.noise(latents))
    side = chosen[0].height
    bias = attention_bias(side**2, given["encoder_hidden_states"].shape[1] - 1, mode != UNATTENDED)
    with KeyBias(bias.to(latents.device)):
        read = tower.backbone.read(noisy, timestep, joined, chosen)
    found = {}
    for tap, values in zip(chosen, read, strict=True):
        maps = values.transpose(1, 2).unflatten(2, (side, side)).float()
        pooled = F.adaptive_avg_pool2d(maps, POOLED).flatten(2).transpose(1, 2).cpu()
        found[tap.name] = (pooled[: len(latents)], pooled[len(latents) :])
    return found


def _read_all(
    model: AnalysisModel, latents: Tensor, texts: list[str], taps: list[str], mode: str, title: str
) -> dict[str, tuple[Tensor, Tensor]]:
    batches = []
    for start in tqdm(range(0, len(latents), BATCH), desc=title, leave=False):
        rows = slice(start, start + BATCH)
        batches.append(read_halves(model, latents[rows], texts[rows], taps, DEFAULT_TIMESTEP, mode))
    return {
        tap: (torch.cat([batch[tap][0] for batch in batches]), torch.cat([batch[tap][1] for batch in batches]))
        for tap in taps
    }


def leakage_units(scenes: Leaking, own: Tensor, wrong: Tensor, train_wrong: Tensor | None = None) -> dict[str, Units]:
    """The leakage to two read-outs, and how well the first one sees the image.

    Args:
        scenes: The scenes.
        own: Features of the training scenes with their own captions.
        wrong: Features of the test scenes with wrong captions.
        train_wrong: Features of the training scenes with wrong captions, on which the second read-out is fitted.

    Returns:
        `dict[str, Units]`: "leaked": a read-out of the image's colours, as in (d). "seen": the same read-out on the
        colours of the image. "decoded": a read-out that is fitted to find the colours of the wrong caption, on the
        same colours as "leaked".
    """
    scores = fit_readout(own.flatten(1), scenes.colours["train"].float())(wrong.flatten(1))
    found = {"leaked": scenes.leaked(scores), "seen": scenes.seen(scores)}
    if train_wrong is not None:
        targets = scenes.colours["train"][scenes.donors["train"]].float()
        found["decoded"] = scenes.leaked(fit_readout(train_wrong.flatten(1), targets)(wrong.flatten(1)))
    return found


Keyed = dict[tuple[str, ...], dict[str, Units]]


def _leakage(model: AnalysisModel, scenes: Leaking, taps: list[str]) -> tuple[Keyed, Keyed]:
    """Units by mode, tap and guidance scale; and by tap and the number of directions that were projected out."""
    units: Keyed = {}
    projected: Keyed = {}
    latents = {split: scene_latents(model, found) for split, found in scenes.scenes.items()}
    for mode in MODES:
        read = {
            (split, wrong): _read_all(
                model, latents[split], scenes.captions(split, wrong), taps, mode, f"{mode}, {split}"
            )
            for split, wrong in (("train", False), ("train", True), ("test", True))
        }
        for tap in tqdm(taps, desc=f"read-outs, {mode}", leave=False):
            halves = {key: found[tap] for key, found in read.items()}
            for scale in GUIDANCE if mode == WHOLE else GUIDANCE[:1]:
                at = {key: guide(*pair, scale) for key, pair in halves.items()}
                units[mode, tap, f"s = {scale:g}"] = leakage_units(
                    scenes, at["train", False], at["test", True], at["train", True]
                )
            if mode == WHOLE:
                for name, features in _projections(halves):
                    projected[tap, name] = leakage_units(
                        scenes, features["train", False], features["test", True], features["train", True]
                    )
    return units, projected


Halves = dict[tuple[str, bool], tuple[Tensor, Tensor]]


def _projections(halves: Halves) -> Iterator[tuple[str, dict[tuple[str, bool], Tensor]]]:
    """Conditional features orthogonal to conditional differences: to each quadrant's own, or to the main ones."""
    found = {}
    for key, (empty, given) in halves.items():
        difference = F.normalize(given - empty, dim=-1)
        found[key] = given - (given * difference).sum(-1, keepdim=True) * difference
    yield "own difference", found
    empty, given = halves["train", False]
    main = torch.linalg.svd((given - empty).flatten(0, 1), full_matrices=False).Vh
    for count in DIRECTIONS:
        basis = main[:count]
        yield f"{count} main differences", {key: x - x @ basis.T @ basis for key, (_, x) in halves.items()}


def _leakage_claims(units: Keyed, projected: Keyed, taps: list[str]) -> list[dict[str, Any]]:
    """Verdicts at the last block's input, where all blocks but one have run, and between blocks."""
    last, first = taps[-2], taps[0]
    default = units[WHOLE, last, "s = 1"]
    guided = units[WHOLE, last, "s = 4"]

    def above_chance(trend: str, found: Units) -> dict[str, Any]:
        return claim_above_zero(trend, found, auc, "AUC", "AUC", zero=0.5)

    removed = projected[last, f"{DIRECTIONS[1]} main differences"]
    unattended, unpooled = (units[mode, last, "s = 1"] for mode in (UNATTENDED, UNPOOLED))
    return [
        above_chance(f"a read-out finds the wrong caption's colours at {last}, s = 1", default["leaked"]),
        above_chance(f"a read-out finds the wrong caption's colours at {last}, s = 4", guided["leaked"]),
        above_chance(f"the prompt's colours can be decoded at {last}, s = 1", default["decoded"]),
        claim(
            f"more of the prompt can be decoded at {last} than at {first}, s = 1",
            units[WHOLE, first, "s = 1"]["decoded"],
            default["decoded"],
            auc,
            "AUC",
            "AUC",
        ),
        claim(
            f"less of the prompt can be decoded at {last} if image tokens do not attend to text, s = 1",
            unattended["decoded"],
            default["decoded"],
            auc,
            "AUC",
            "AUC",
        ),
        above_chance(
            f"the prompt's colours can still be decoded at {last} if image tokens do not attend to text, s = 1",
            unattended["decoded"],
        ),
        claim(
            f"less of the prompt can be decoded at {last} with the pooled text of the empty prompt, s = 1",
            unpooled["decoded"],
            default["decoded"],
            auc,
            "AUC",
            "AUC",
        ),
        claim(
            f"less of the prompt can be decoded at {last} without the {DIRECTIONS[1]} main conditional differences",
            removed["decoded"],
            default["decoded"],
            auc,
            "AUC",
            "AUC",
        ),
    ]


# Parts of the study of the UNet, on the transformer

QUESTION_VARIANTS = (
    Variant("CLIP", ("vision",)),
    *(Variant(f"diffusion, s = {s:g}", ("diffusion",), guidance=s, denoiser=FOLDER) for s in (0.0, 1.0, 4.0)),
    *(Variant(f"cross-attention, s = {s:g}", BOTH, "cross_attention", s, denoiser=FOLDER) for s in (0.0, 1.0, 4.0)),
)
QUESTION_TRENDS = {
    "cross-attention at s = 4 is more accurate than CLIP (S3, Table 2)": ("CLIP", "cross-attention, s = 4"),
    "cross-attention at s = 0 is more accurate than CLIP (S3, Table 2)": ("CLIP", "cross-attention, s = 0"),
    "with cross-attention, s = 4 is more accurate than s = 0 (S3, Table 2)": (
        "cross-attention, s = 0",
        "cross-attention, s = 4",
    ),
    "with cross-attention, s = 1 is more accurate than s = 0": ("cross-attention, s = 0", "cross-attention, s = 1"),
    "only the transformer, s = 0, is more accurate than CLIP": ("CLIP", "diffusion, s = 0"),
    "only the transformer, s = 4 is more accurate than s = 0": ("diffusion, s = 0", "diffusion, s = 4"),
}


def measure_questions(parts: Path, work: Path, scale: StudyScale) -> dict[str, Any]:
    """As (c): only CLIP, only the transformer, and both, at s = 0, 1 and 4."""
    return questions.measure(parts, work, scale, QUESTION_VARIANTS, QUESTION_TRENDS)


def measure_captions(parts: Path, work: Path, scale: StudyScale) -> dict[str, Any]:
    """As (d): captions with guidance and dropout, and the leakage of wrong captions."""
    return captions.measure(parts, work, scale, FOLDER)


def measure_matching(parts: Path, work: Path, scale: StudyScale) -> dict[str, Any]:
    """As (b), by attention and by the error of the velocity, with one noise draw."""
    benchmark = get_matching_benchmark("mini_pairs")
    rows, units = {}, {}
    for score in ("attention", "attention-relative", "denoising"):
        options = MatchingOptions(score=score, trials=1)
        rows[score], units[score] = run_matcher(
            parts, FOLDER, f"{FOLDER}/transformer", work / score, options, scale.match_items
        )
    return {
        "rows": rows,
        "claims": [
            claim_above_zero(
                f"{score} matches more minimal pairs than chance", found, benchmark.scores, "average", "points", 25.0
            )
            for score, found in units.items()
        ],
    }
