"""Where the words of a question look in an image (S3, section 4.1, Figures 4, 10 and 11)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from ..attention_maps import AttentionMaps
from ..diffusion import SDLlavaDiffusionModel
from ..image_loading import load_rgb
from ..modeling_sdllava import SDLlavaForConditionalGeneration, SDLlavaImageEncodings
from ..pipeline import check_question
from ..processors import SDLlavaProcessor
from .loading import short_name
from .reading import read_elsewhere


@dataclass(frozen=True)
class Word:
    """A word of a prompt.

    Args:
        text (`str`): as in the prompt; special tokens are `<begin>`, `<end>`, `<padding>` and `<implicit caption>`.
        tokens (`tuple[int, ...]`): positions of its tokens in the prompt.
        special (`bool`): no word of the question.
    """

    text: str
    tokens: tuple[int, ...]
    special: bool


@dataclass
class HeatMap:
    """A map over an image.

    Args:
        values (`np.ndarray` of shape `(height, width)`, float32): at the image's own size.
        grid (`np.ndarray` of shape `(side, side)`, float32): as the model sees it, over the padded square.
        image (`PIL.Image.Image`): what it lies over.
        label (`str`): what it shows.
        unit (`str`): of the values.
        place (`str`): model, layers and timesteps, for titles.
    """

    values: np.ndarray
    grid: np.ndarray
    image: Image.Image
    label: str
    unit: str
    place: str


@dataclass
class QuestionAttention:
    """The attention of one image's positions to the words of its question.

    Args:
        words (`list[Word]`): in the order of the prompt, special tokens among them.
        maps (`np.ndarray` of shape `(len(words), side, side)`, float32): the share of attention that each word gets,
            its tokens added up; over words it sums to one.
        image (`PIL.Image.Image`): upright RGB, not padded.
        place (`str`): layers and timesteps, for titles.
    """

    words: list[Word]
    maps: np.ndarray
    image: Image.Image
    place: str

    def word(self, word: int | str) -> HeatMap:
        """The map of a word by its index in `words`, or of every occurrence of a text."""
        if isinstance(word, int):
            chosen = [word]
        else:
            chosen = [i for i, known in enumerate(self.words) if known.text.lower() == word.lower()]
        if not chosen:
            known = [w.text for w in self.words if not w.special]
            raise ValueError(f"the question has no word {word!r}: it has {known}")
        return self._heat_map(chosen, f"“{self.words[chosen[0]].text}”")

    def question(self) -> HeatMap:
        """The map of all words together, special tokens left out."""
        return self._heat_map([i for i, word in enumerate(self.words) if not word.special], "the question's words")

    def _heat_map(self, words: list[int], label: str) -> HeatMap:
        grid = self.maps[words].sum(axis=0)
        values = map_onto_image(grid, self.image.size)
        return HeatMap(values, grid, self.image, label, "share of attention", self.place)


def words_in_prompt(
    tokenizer: PreTrainedTokenizerBase, input_ids: Sequence[int], num_tokens: int | None = None
) -> list[Word]:
    """The words of a tokenized prompt, sub-word tokens joined.

    Args:
        tokenizer: CLIP's, which marks the end of a word with `</w>`.
        input_ids: token ids of one prompt, with begin, end and padding.
        num_tokens: length of what the UNet saw, where implicit caption tokens follow the prompt.
    """
    ids = [int(i) for i in input_ids]
    end = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else len(ids)
    words = [Word("<begin>", (0,), True)] if ids[:1] == [tokenizer.bos_token_id] else []
    pieces: list[int] = []
    for position in range(len(words), end):
        pieces.append(position)
        if tokenizer.convert_ids_to_tokens(ids[position]).endswith("</w>") or position == end - 1:
            text = tokenizer.decode([ids[i] for i in pieces]).strip()
            words.append(Word(text, tuple(pieces), False))
            pieces = []
    total = max(len(ids), num_tokens or 0)
    spans = {"<end>": (end, end + 1), "<padding>": (end + 1, len(ids)), "<implicit caption>": (len(ids), total)}
    special = {text: tuple(range(start, min(stop, total))) for text, (start, stop) in spans.items()}
    return words + [Word(text, tokens, True) for text, tokens in special.items() if tokens]


def join_words(maps: torch.Tensor, words: Sequence[Word]) -> np.ndarray:
    """Token maps `(tokens, h, w)` as word maps `(words, h, w)`, float32: the maps of a word's tokens added up."""
    return np.stack([maps[list(word.tokens)].sum(dim=0).float().numpy() for word in words])


def map_onto_image(grid: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """A map over the padded square, enlarged (bilinear) and cropped to the image.

    Args:
        grid (`np.ndarray` of shape `(side, side)`): over the square that [`~sdllava.image_loading.pad_to_square`] made.
        image_size: width and height of the image in pixels.

    Returns:
        `np.ndarray` of shape `(height, width)`, float32.
    """
    width, height = image_size
    side = max(width, height)
    square = F.interpolate(torch.as_tensor(grid).float()[None, None], (side, side), mode="bilinear")[0, 0]
    top, left = (side - height) // 2, (side - width) // 2
    return square[top : top + height, left : left + width].numpy()


def attention_by_word(
    maps: AttentionMaps,
    tokenizer: PreTrainedTokenizerBase,
    images: Sequence[Image.Image],
    resolution: int | None = None,
    layers: Sequence[str] | None = None,
    timesteps: Sequence[int] | None = None,
) -> list[QuestionAttention]:
    """Captured maps, averaged at one resolution and joined to words, one entry an image.

    Args:
        maps: from `tower.capture_attention()`.
        tokenizer: the diffusion model's (first) tokenizer.
        images: upright RGB, as they were before padding.
        resolution, layers, timesteps: see [`~sdllava.attention_maps.AttentionMaps.average`].
    """
    mean = maps.average(resolution, layers, timesteps)
    shown = [
        layer
        for layer in maps.layers
        if (layers is None or layer in layers) and maps[layer, maps.timesteps[0]].shape[-1] == mean.shape[-1]
    ]
    times = ", ".join(str(timestep) for timestep in timesteps or maps.timesteps)
    place = f"{', '.join(shown)} ({mean.shape[-1]}×{mean.shape[-1]}), t = {times}"
    found = []
    for ids, image, tokens in zip(maps.input_ids, images, mean, strict=True):
        words = words_in_prompt(tokenizer, ids, len(tokens))
        found.append(QuestionAttention(words, join_words(tokens, words), image, place))
    return found


def capture_question(
    tower: SDLlavaDiffusionModel,
    processor: SDLlavaProcessor,
    image: Image.Image,
    question: str,
    layers: Sequence[str] | None = None,
    timesteps: Sequence[int] | None = None,
) -> AttentionMaps:
    """The attention to one question over one image, by layer and timestep.

    Args:
        tower, processor: from [`~sdllava.analysis.loading.load_subject`], or a model's own.
        image: upright RGB.
        layers: transformer blocks, e.g. `["U-L1-R1-B0"]`; default all that run.
        timesteps: default the tower's.

    Raises:
        ValueError: the question is empty.
    """
    question = check_question(question)
    reader = read_elsewhere(tower, timesteps=timesteps, guidance_scales=[1.0])
    reader.config.conditioning = "question"
    inputs = processor(images=image, question=question, return_tensors="pt").to(reader.text_encoder.device)
    ids = [inputs[name] for name in ("diffusion_input_ids", "diffusion_input_ids_2") if name in inputs]
    with torch.no_grad(), reader.capture_attention(layers) as maps:
        reader(inputs["diffusion_pixel_values"], *ids)
    return maps


def question_attention(
    tower: SDLlavaDiffusionModel,
    processor: SDLlavaProcessor,
    image: Any,
    question: str,
    layers: Sequence[str] | None = None,
    timesteps: Sequence[int] | None = None,
    resolution: int | None = None,
) -> QuestionAttention:
    """[`capture_question`], averaged over layers and timesteps and joined to words.

    Args:
        image: anything that [`~sdllava.image_loading.load_rgb`] reads.
        resolution: average the layers whose maps have this height; default [`default_resolution`].
    """
    image = load_rgb(image)
    maps = capture_question(tower, processor, image, question, layers, timesteps)
    resolution = default_resolution(maps, tower) if resolution is None else resolution
    return attention_by_word(maps, processor.diffusion_tokenizer, [image], resolution)[0]


def default_resolution(maps: AttentionMaps, tower: SDLlavaDiffusionModel) -> int:
    """A quarter of the latents' height, 16 for the papers' model (S3, 4.1), or the nearest that was captured."""
    quarter = tower.config.latent_size // 4
    return min(maps.resolutions, key=lambda size: (abs(size - quarter), size))


def question_heatmap(
    model: SDLlavaForConditionalGeneration,
    processor: SDLlavaProcessor,
    image: Any,
    question: str,
    image_encodings: SDLlavaImageEncodings | None = None,
) -> HeatMap:
    """Where a model's question looks: all words together, averaged over the layers at [`default_resolution`].

    Args:
        image: anything that [`~sdllava.image_loading.load_rgb`] reads.
        image_encodings: from `model.encode_images` on this image; the call then costs one conditional pass.

    Raises:
        ValueError: the model has no diffusion tower, or always asks it with the empty prompt.
    """
    return model_attention(model, processor, image, question, image_encodings).question()


def model_attention(
    model: SDLlavaForConditionalGeneration,
    processor: SDLlavaProcessor,
    image: Any,
    question: str,
    image_encodings: SDLlavaImageEncodings | None = None,
) -> QuestionAttention:
    """As [`question_heatmap`], for each word."""
    tower = model.base_model.diffusion_tower
    if tower is None:
        raise ValueError("this model has no diffusion tower, so no question looks anywhere")
    if tower.config.conditioning == "none":
        raise ValueError("this model asks its diffusion tower the empty prompt only, so no question looks anywhere")
    image = load_rgb(image)
    inputs = dict(processor(images=image, question=question, return_tensors="pt").to(model.device))
    if image_encodings is not None:
        inputs = {name: x for name, x in inputs.items() if not name.endswith("pixel_values")}
        inputs["image_encodings"] = image_encodings
    with torch.no_grad(), tower.capture_attention() as maps:
        scales = [1.0] * len(tower.config.guidance_scales)
        model.get_image_features(**inputs, diffusion_guidance_scales=scales)
    found = attention_by_word(maps, processor.diffusion_tokenizer, [image], default_resolution(maps, tower))[0]
    name = short_name(model.name_or_path)
    return replace(found, place=f"{name}, {found.place}") if name else found
