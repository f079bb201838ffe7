"""Image-text matching with a diffusion model's cross-attention, computed as in the released Discffusion code.

S(I, T) = mean over timesteps, layers, {empty prompt, T}, heads and pixels of log sum_k exp(q_p . k_k / sqrt(d))

over all 77 keys of the pre-softmax logits (arXiv 2305.10722; S3 section 4.1, S4 section 4). The papers describe it
differently (all layers, summed maps). The defaults here follow the released code and the papers' timesteps. Queries and
keys are read with hooks on unmodified diffusers modules.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from PIL.Image import Resampling
from transformers import PreTrainedTokenizerBase

from ..diffusion import SDLlavaDiffusionModel
from ..families import is_tiny_vae
from ..image_loading import ImageLike, load_rgb
from ..taps import Tap, list_taps, resolve_taps

TOKEN_MASKS = ("all", "no_padding", "text")
Pair = tuple[int, int]
"""Indices of a text and an image. Text -1 is the empty prompt."""


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
        layers: "last" (in each stage, the last block that attends to text), "all", or names of Cross-Q taps.
        unconditional: Whether the mean includes the empty prompt's half of the batch.
        tokens: Keys to sum over: "all" 77, "no_padding" (begin, words, end) or "text" (words).
        bias: Adds ||eps - eps_empty|| - ||eps - eps_T||, which the released code does by default.
        trials: Number of noise draws.
        seed: Seed of the first draw. The following draws use `seed + 1`, `seed + 2`, ...

    Raises:
        ValueError: A value is outside its range.
    """

    timesteps: tuple[int, ...] = tuple(published_timesteps(5))
    layers: str | tuple[str, ...] = "last"
    unconditional: bool = True
    tokens: str = "all"
    bias: bool = False
    trials: int = 3
    seed: int = 0

    def __post_init__(self):
        if self.tokens not in TOKEN_MASKS:
            raise ValueError(f"Unknown token mask {self.tokens!r}. Choose one of {', '.join(TOKEN_MASKS)}.")
        if self.tokens == "text" and self.unconditional:
            raise ValueError("The token mask 'text' leaves no tokens of the empty prompt. Add --no-unconditional.")
        if bad := [t for t in self.timesteps if not 0 <= t <= 999]:
            raise ValueError(f"Timestep {bad[0]} is outside the training schedule. Use a value in 0..999.")
        if self.trials < 1 or not self.timesteps:
            raise ValueError(
                f"Matching with {self.trials} trials and {len(self.timesteps)} timesteps is empty. Use at least one of "
                "each."
            )


DEFAULT_MATCHING = MatchingOptions()


def attention_layers(unet: UNet2DConditionModel, layers: str | Sequence[str]) -> list[str]:
    """Module paths of the selected cross-attentions, in the order of the forward pass.

    Args:
        unet: The whole UNet.
        layers: See `MatchingOptions`.

    Raises:
        ValueError: The choice is unknown, or a tap does not exist or is not a Cross-Q tap.
    """
    paths = [name for name, _ in unet.named_modules() if name.endswith(".attn2")]
    stages = {stage: [p for p in paths if p.startswith(stage)] for stage in ("down_blocks", "mid_block", "up_blocks")}
    every = [path for stage in stages.values() for path in stage]
    if layers == "all":
        return every
    if layers == "last":
        return [path for stage in stages.values() for path in _last_block(stage)]
    if isinstance(layers, str):
        raise ValueError(f"Unknown layers {layers!r}. Choose last, all, or names of Cross-Q taps.")
    taps = resolve_taps(list(layers), list_taps(dict(unet.config)))
    if wrong := [tap.name for tap in taps if not tap.name.endswith("Cross-Q")]:
        raise ValueError(f"The tap {wrong[0]!r} is not a query of a cross-attention. Use Cross-Q taps for matching.")
    return [tap.module_path.removesuffix(".to_q") for tap in taps]


def _last_block(stage: list[str]) -> list[str]:
    """The last transformer block of each attention in the last block of a stage."""
    blocks = [path.split(".attentions.")[0] for path in stage]
    by_attention = {path.split(".transformer_blocks.")[0]: path for path in stage if path.startswith(blocks[-1] + ".")}
    return list(by_attention.values()) if stage else []


def pooled_logits(
    query: torch.Tensor, key: torch.Tensor, attention: Attention, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean over heads and pixels of log sum over keys of exp(q . k * scale), in float32.

    Args:
        query: `(n, pixels, heads * d)`, the output of `to_q`.
        key: `(n, tokens, heads * d)`, the output of `to_k`.
        attention: Their attention module.
        mask: `(n, tokens)`, True for the keys to sum over.

    Returns:
        `torch.FloatTensor` of shape `(n,)`.
    """
    query = query.float().unflatten(-1, (attention.heads, -1)).transpose(1, 2)
    key = key.float().unflatten(-1, (attention.heads, -1)).transpose(1, 2)
    logits = query @ key.transpose(-1, -2) * attention.scale
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None, None, :], -torch.inf)
    return logits.logsumexp(dim=-1).mean(dim=(1, 2))


class DiffusionMatcher:
    """Scores images against texts with a whole (not truncated) diffusion tower.

    Args:
        tower: From `SDLlavaDiffusionModel.from_component_pretrained(..., truncate=False)`.
        tokenizers: The tower's tokenizer, or SDXL's two.
        options: Options of the score.
        batch_size: Rows per pass of the UNet. Scores do not depend on it.

    Raises:
        ValueError: The tower is truncated, has no UNet or a tiny autoencoder, or a layer does not exist.
    """

    def __init__(
        self,
        tower: SDLlavaDiffusionModel,
        tokenizers: Sequence[PreTrainedTokenizerBase],
        options: MatchingOptions = DEFAULT_MATCHING,
        batch_size: int = 8,
    ):
        if tower.config.truncate:
            raise ValueError("The tower is truncated, but matching needs the whole UNet. Load it with truncate=False.")
        if tower.config.unet_config is None:
            raise ValueError(
                f"Matching needs a UNet, but the family of this tower is {tower.config.family.name!r}. Use Stable "
                "Diffusion 1.x, 2.x or SDXL."
            )
        if is_tiny_vae(tower.config.vae_config or {}):
            raise ValueError(
                "The tower has a tiny autoencoder, which cannot sample latents. Load it with its VAE for matching."
            )
        self.tower, self.tokenizers, self.options, self.batch_size = tower, list(tokenizers), options, batch_size
        self.layers = attention_layers(tower.unet, options.layers)
        paths = [f"{layer}.{projection}" for layer in self.layers for projection in ("to_q", "to_k")]
        self.taps = [Tap(path, path, 0, 0, 0) for path in paths + (["conv_out"] if options.bias else [])]

    @property
    def timesteps(self) -> tuple[int, ...]:
        """Timesteps of the scores."""
        return self.options.timesteps

    @torch.inference_mode()
    def score(self, images: Sequence[ImageLike], texts: Sequence[str]) -> np.ndarray:
        """Scores of every text with every image, in float64.

        Returns:
            `np.ndarray` of shape `(trials, timesteps, texts, images)`.

        Raises:
            ValueError: An image cannot be read, or a text has no tokens under the mask "text".
        """
        posterior = self._posterior(images)
        prompts, mask = self._prompts(texts)
        rows = [(text, image) for text in range(-1, len(texts)) for image in range(len(images))]
        if not (self.options.unconditional or self.options.bias):
            rows = [row for row in rows if row[0] >= 0]
        result = np.empty((self.options.trials, len(self.timesteps), len(texts), len(images)))
        for trial in range(self.options.trials):
            generator = torch.Generator().manual_seed(self.options.seed + trial)
            latents = self._sample(posterior, generator)
            for position, timestep in enumerate(self.timesteps):
                noise = torch.randn(latents.shape[1:], generator=generator).to(latents.device)
                values = self._rows(latents, noise, timestep, prompts, mask, rows)
                result[trial, position] = self._combine(values, len(texts), len(images))
        return result

    def _combine(self, values: Mapping[Pair, tuple[float, float]], texts: int, images: int) -> np.ndarray:
        """Scores from the attention score and the distance of each pair."""
        scores = np.empty((texts, images))
        for text in range(texts):
            for image in range(images):
                attention, distance = values[text, image]
                if self.options.unconditional:
                    attention = (attention + values[-1, image][0]) / 2
                scores[text, image] = attention
                if self.options.bias:
                    scores[text, image] += values[-1, image][1] - distance
        return scores

    def _posterior(self, images: Sequence[ImageLike]) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the latents, each `(n, 4, h, w)` in float32, encoded one by one."""
        size, vae = self.tower.config.image_size, self.tower.vae
        means, deviations = [], []
        for image in images:
            squashed = load_rgb(image).resize((size, size), Resampling.LANCZOS)
            pixels = torch.from_numpy(np.asarray(squashed, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
            posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
            means.append(posterior.mean.float())
            deviations.append(posterior.std.float())
        return torch.cat(means), torch.cat(deviations)

    def _sample(self, posterior: tuple[torch.Tensor, torch.Tensor], generator: torch.Generator) -> torch.Tensor:
        """Latents drawn with one noise map for all images, so that no image depends on the others."""
        mean, deviation = posterior
        noise = torch.randn(mean.shape[1:], generator=generator).to(mean.device)
        return (mean + deviation * noise) * self.tower.vae.config.scaling_factor

    def _prompts(self, texts: Sequence[str]) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """Conditioning of the texts and, last, of the empty prompt, and the mask of the keys to sum over."""
        tokenized = [
            tokenizer([*texts, ""], padding="max_length", truncation=True, max_length=77)
            for tokenizer in self.tokenizers
        ]
        device = self.tower.text_encoder.device
        prompts = self.tower.encode_prompts(*(torch.tensor(t["input_ids"], device=device) for t in tokenized))
        if self.options.tokens == "all":
            return prompts, None
        mask = torch.tensor(tokenized[0]["attention_mask"], dtype=torch.bool, device=device)
        if self.options.tokens == "text":
            length = mask.sum(dim=1)
            mask[:, 0] = False
            mask[torch.arange(len(mask)), length - 1] = False
            if empty := [text for text, row in zip(texts, mask, strict=False) if not row.any()]:
                raise ValueError(f"The text {empty[0]!r} has no tokens to match. Leave it out, or use --tokens all.")
        return prompts, mask

    def _rows(
        self,
        latents: torch.Tensor,
        noise: torch.Tensor,
        timestep: int,
        prompts: Mapping[str, torch.Tensor],
        mask: torch.Tensor | None,
        rows: Sequence[Pair],
    ) -> dict[Pair, tuple[float, float]]:
        """Attention score, and distance of the predicted noise, of each pair."""
        values: dict[Pair, tuple[float, float]] = {}
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            texts = [text for text, _ in batch]
            chosen = latents[[image for _, image in batch]]
            noisy = self.tower.add_noise(chosen, timestep, noise)
            conditioning = {name: value[texts] for name, value in prompts.items()}
            read = self.tower.backbone.read(noisy, timestep, conditioning, self.taps)
            kept = None if mask is None else mask[texts]
            layers = [
                pooled_logits(read[2 * k], read[2 * k + 1], self.tower.unet.get_submodule(path), kept)
                for k, path in enumerate(self.layers)
            ]
            attention = torch.stack(layers).mean(dim=0).tolist()
            distance = [0.0] * len(batch)
            if self.options.bias:
                predicted = self._predicted_noise(read[-1].float(), noisy, timestep)
                distance = (noise - predicted).flatten(1).norm(dim=1).tolist()
            values.update(zip(batch, zip(attention, distance, strict=True), strict=True))
        return values

    def _predicted_noise(self, output: torch.Tensor, noisy: torch.Tensor, timestep: int) -> torch.Tensor:
        """The predicted noise: the UNet's output, or computed from the velocity in v-prediction."""
        if (self.tower.config.scheduler_config or {}).get("prediction_type", "epsilon") != "v_prediction":
            return output
        zero = torch.zeros_like(noisy)
        signal, spread = (
            self.tower.add_noise(*pair) for pair in ((zero + 1, timestep, zero), (zero, timestep, zero + 1))
        )
        return signal * output + spread * noisy
