"""Image-text matching with a diffusion model (S3 section 4.1, S4 section 4): options, and the scores of all pairs.

`matching_scores.py` has the formulas. By default the score is that of the released Discffusion code at the papers'
timesteps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL.Image import Resampling
from transformers import PreTrainedTokenizerBase

from ..backbone import Prompts
from ..diffusion import SDLlavaDiffusionModel
from ..image_loading import ImageLike, load_rgb
from ..prompts import clean_prompts, prompt_length
from .matching_scores import DenoisingScore, NoiseDistance, PooledLogits, Score, SummedMaps, attention_taps

SCORES = ("attention", "attention-relative", "denoising")
READINGS = {
    "code": {"layers": "last", "pooling": "logits"},
    "s3": {"layers": "all", "pooling": "maps"},
    "s4": {"layers": "all", "pooling": "logits"},
}
"""How the attention is pooled: as the released code does, as S3 describes it, as S4 describes it."""
TOKEN_MASKS = ("all", "no_padding", "text")


def published_timesteps(count: int) -> list[int]:
    """The released code's timesteps on the 1000-step schedule: from 989 down in strides of 1000 // count, above 9.

    5 gives 189, 389, 589, 789, 989 and 10 gives 89, 189, ..., 989, as in the papers.

    Raises:
        ValueError: `count` is not in 1..100.
    """
    if not 1 <= count <= 100:
        raise ValueError(f"{count} timesteps are outside the released rule. Use a number in 1..100.")
    return [999 - index for index in range(10, 990, 1000 // count)][::-1]


@dataclass(frozen=True)
class MatchingOptions:
    """Options of the score. The defaults are the released code's without its bias term, as in the papers.

    Attributes:
        timesteps: On the 1000-step schedule, ascending. Each has its own noise map.
        score: "attention"; "attention-relative" (minus that of the empty prompt on the same image); or "denoising" (how
            much smaller the text makes the mean squared error of the prediction, compared with the empty prompt).
        pooling: Of the attention: "logits" or "maps"; see `READINGS`.
        layers: "last" (in each stage, the last block that attends to text), "all", or names of Cross-Q or Joint-Q taps.
        unconditional: Whether "attention" is averaged with the empty prompt's half of the batch.
        tokens: Keys to pool: "all" 77, "no_padding" (begin, words, end) or "text" (words).
        bias: Adds ||eps - eps_empty|| - ||eps - eps_T|| to "attention", which the released code does by default.
        trials: Number of noise draws.
        seed: Seed of the first draw. The following draws use `seed + 1`, `seed + 2`, ...

    Raises:
        ValueError: A value is outside its range, or options exclude each other.
    """

    timesteps: tuple[int, ...] = tuple(published_timesteps(5))
    score: str = "attention"
    pooling: str = "logits"
    layers: str | tuple[str, ...] = "last"
    unconditional: bool = True
    tokens: str = "all"
    bias: bool = False
    trials: int = 3
    seed: int = 0

    def __post_init__(self):
        for name, value, known in (
            ("score", self.score, SCORES),
            ("pooling", self.pooling, ("logits", "maps")),
            ("token mask", self.tokens, TOKEN_MASKS),
        ):
            if value not in known:
                raise ValueError(f"Unknown {name} {value!r}. Choose one of {', '.join(known)}.")
        if self.tokens == "text" and self.score == "attention-relative":
            raise ValueError(
                "The token mask 'text' leaves no tokens of the empty prompt, which attention-relative needs. Use "
                "--tokens no_padding."
            )
        if self.tokens == "text" and self.score == "attention" and self.unconditional:
            raise ValueError("The token mask 'text' leaves no tokens of the empty prompt. Add --no-unconditional.")
        if self.bias and (self.score != "attention" or self.pooling == "maps"):
            raise ValueError(
                "The bias is part of the released code's score. Leave out --bias, or use --score attention."
            )
        if bad := [t for t in self.timesteps if not 0 <= t <= 999]:
            raise ValueError(f"Timestep {bad[0]} is outside the training schedule. Use a value in 0..999.")
        if self.trials < 1 or not self.timesteps:
            raise ValueError(
                f"Matching with {self.trials} trials and {len(self.timesteps)} timesteps is empty. Use at least one of "
                "each."
            )

    @property
    def needs_empty_prompt(self) -> bool:
        """Whether the score of a pair depends on the image's score with the empty prompt."""
        return self.score != "attention" or self.unconditional or self.bias


DEFAULT_MATCHING = MatchingOptions()


class DiffusionMatcher:
    """Scores images against texts with a whole (not truncated) diffusion tower.

    Args:
        tower: From `SDLlavaDiffusionModel.from_component_pretrained(..., truncate=False)`.
        tokenizers: The tower's tokenizers, in the order of `encode_prompts`.
        options: Options of the score.
        batch_size: Rows per pass of the denoiser. Scores do not depend on it.

    Raises:
        ValueError: The tower is truncated, or a layer does not exist.
    """

    def __init__(
        self,
        tower: SDLlavaDiffusionModel,
        tokenizers: Sequence[PreTrainedTokenizerBase],
        options: MatchingOptions = DEFAULT_MATCHING,
        batch_size: int = 8,
    ):
        if tower.config.truncate:
            raise ValueError(
                "The tower is truncated, but matching needs the whole denoiser. Load it with truncate=False."
            )
        self.tower, self.tokenizers, self.options, self.batch_size = tower, list(tokenizers), options, batch_size
        self.layers: list[str] = []
        self._score: Score = DenoisingScore(tower)
        if options.score != "denoising":
            taps = attention_taps(tower, options.layers)
            self.layers = [tap.name for tap in taps]
            self._score = (SummedMaps if options.pooling == "maps" else PooledLogits)(tower, taps)

    @property
    def model(self) -> SDLlavaDiffusionModel:
        """The tower, whose weights identify the model."""
        return self.tower

    @property
    def timesteps(self) -> tuple[int, ...]:
        """Timesteps of the scores; empty if the score has none of its own, because maps are summed over them."""
        return self.options.timesteps if self._score.per_timestep else ()

    @torch.inference_mode()
    def score(self, images: Sequence[ImageLike], texts: Sequence[str]) -> np.ndarray:
        """Scores of every text with every image, in float64.

        Returns:
            `np.ndarray` of shape `(trials, timesteps or 1, texts, images)`.

        Raises:
            ValueError: An image cannot be read, or a text has no tokens under the mask "text".
        """
        mean, deviation = self._encode(images)
        prompts, mask = self._prompts(texts)
        trials = []
        for trial in range(self.options.trials):
            generator = torch.Generator().manual_seed(self.options.seed + trial)
            draws = [torch.randn(mean.shape[1:], generator=generator) for _ in range(1 + len(self.options.timesteps))]
            posterior, *noises = (draw.to(mean.device) for draw in draws)
            # one map for all images, so that no image depends on the others; the denoising error uses the mean
            latents = mean if self.options.score == "denoising" else mean + deviation * posterior
            trials.append(self._trial(latents, noises, prompts, mask))
        return np.stack(trials)

    def _trial(
        self, latents: torch.Tensor, noises: list[torch.Tensor], prompts: Prompts, mask: torch.Tensor | None
    ) -> np.ndarray:
        """Scores `(timesteps or 1, texts, images)` with one noise draw."""
        values = self._values(self._score, latents, noises, prompts, mask)
        own, empty = values[:, :-1], values[:, -1:]
        if self.options.score != "attention":
            return own - empty
        scores = (own + empty) / 2 if self.options.unconditional else own
        if self.options.bias:
            distances = self._values(NoiseDistance(self.tower), latents, noises, prompts, mask)
            scores = scores + distances[:, :-1] - distances[:, -1:]
        return scores

    def _values(
        self,
        score: Score,
        latents: torch.Tensor,
        noises: list[torch.Tensor],
        prompts: Prompts,
        mask: torch.Tensor | None,
    ) -> np.ndarray:
        """Values `(timesteps or 1, texts + 1, images)`; of the last text, the empty prompt, NaN if it is not needed."""
        count = len(prompts["encoder_hidden_states"])
        texts = range(count if self.options.needs_empty_prompt else count - 1)
        pairs = [(text, image) for text in texts for image in range(len(latents))]
        found = []
        for start in range(0, len(pairs), self.batch_size):
            chosen, which = (list(indices) for indices in zip(*pairs[start : start + self.batch_size], strict=True))
            conditioning = {name: value[chosen] for name, value in prompts.items()}
            kept = None if mask is None else mask[chosen]
            rows = score.values(latents[which], noises, self.options.timesteps, conditioning, kept)
            found.append(rows.double().cpu().numpy())
        values = np.full((len(found[0]), count, len(latents)), np.nan)
        values[:, : len(texts)] = np.concatenate(found, axis=1).reshape(len(found[0]), len(texts), len(latents))
        return values

    def _encode(self, images: Sequence[ImageLike]) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the latents, each `(n, channels, h, w)`, encoded one by one."""
        size, weight = self.tower.config.image_size, self.tower.backbone.image_weight
        encoded = []
        for image in images:
            squashed = load_rgb(image).resize((size, size), Resampling.LANCZOS)
            pixels = torch.from_numpy(np.asarray(squashed, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
            encoded.append(self.tower.backbone.image_distribution(pixels.to(weight.device)))
        means, deviations = zip(*encoded, strict=True)
        return torch.cat(means), torch.cat(deviations)

    def _prompts(self, texts: Sequence[str]) -> tuple[Prompts, torch.Tensor | None]:
        """Conditioning of the texts and, last, of the empty prompt, and the mask of the keys to pool."""
        tokenized = [
            tokenizer(
                clean_prompts(tokenizer, [*texts, ""]),
                padding="max_length",
                truncation=True,
                max_length=prompt_length(tokenizer),
            )
            for tokenizer in self.tokenizers
        ]
        device = self.tower.backbone.prompt_weight.device
        prompts = self.tower.encode_prompts(*(torch.tensor(t["input_ids"], device=device) for t in tokenized))
        if self.options.tokens == "all" or self.options.score == "denoising":
            return prompts, None
        mask = torch.zeros(prompts["encoder_hidden_states"].shape[:2], dtype=torch.bool, device=device)
        start = 0
        for index in self.tower.config.family.prompt_tokenizers:
            if index < len(tokenized):
                kept = self._kept_tokens(index, tokenized[index])
                mask[:, start : start + kept.shape[1]] = kept
                start += kept.shape[1]
        if empty := [text for text, row in zip(texts, mask, strict=False) if not row.any()]:
            raise ValueError(f"The text {empty[0]!r} has no tokens to match. Leave it out, or use --tokens all.")
        return prompts, mask

    def _kept_tokens(self, index: int, tokenized: Any) -> torch.Tensor:
        """Which tokens of a tokenizer are pooled, `(texts, tokens)`."""
        kept = torch.tensor(tokenized["attention_mask"], dtype=torch.bool)
        if self.options.tokens == "text":
            special = torch.tensor(self.tokenizers[index].all_special_ids)
            kept &= ~torch.isin(torch.tensor(tokenized["input_ids"]), special)
        return kept
