"""Attention of image positions to the words of a question (S3, section 4.1, Figures 4, 10 and 11)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from ..attention_maps import AttentionMaps
from ..diffusion import SDLlavaDiffusionModel
from ..image_loading import ImageLike, load_rgb
from ..modeling_sdllava import SDLlavaForConditionalGeneration, SDLlavaImageEncodings
from ..names import check_question
from ..processors import INPUT_IDS, TOKENIZERS, SDLlavaProcessor
from .loading import short_name
from .reading import reconfigure

SHARE_OF_ATTENTION, SHARE_OF_WORDS = "share of attention", "share among the words"
"""Units of attention maps and of concept maps."""


@dataclass(frozen=True)
class Word:
    """A word of a prompt.

    Args:
        text (`str`): As in the prompt. Special tokens are `<begin>`, `<end>`, `<padding>` and `<no text>`: an implicit
            caption, or the zeros that stand for T5's part of the prompt where Stable Diffusion 3 is used without T5.
        tokens (`tuple[int, ...]`): Positions of its tokens in the prompt.
        special (`bool`): Whether it stands for special tokens.
    """

    text: str
    tokens: tuple[int, ...]
    special: bool


@dataclass
class HeatMap:
    """A map over an image.

    Args:
        values (`np.ndarray` of shape `(height, width)`, float32): At the image's size.
        grid (`np.ndarray` of shape `(side, side)`, float32): Over the padded square, at the layers' resolution.
        image (`PIL.Image.Image`): Upright RGB, not padded.
        label (`str`): The word or words.
        unit (`str`): Unit of the values.
        description (`str`): Model, layers and timesteps, for titles.
    """

    values: np.ndarray
    grid: np.ndarray
    image: Image.Image
    label: str
    unit: str
    description: str


@dataclass
class QuestionAttention:
    """The attention of an image's positions to the words of a question.

    Args:
        words (`list[Word]`): In the order of the prompt, with special tokens. Where the denoiser attends to the tokens
            of two text encoders, those of the first, then those of the second.
        maps (`np.ndarray` of shape `(len(words), side, side)`, float32): Each word's share of the attention, summed
            over its tokens. In cross-attention the shares of all words sum to one; in joint attention to that part of
            the attention that is not over the image itself. Concept maps: see [`concept_shares`].
        image (`PIL.Image.Image`): Upright RGB, not padded.
        description (`str`): Layers and timesteps, for titles.
        unit (`str`): Unit of the maps.
    """

    words: list[Word]
    maps: np.ndarray
    image: Image.Image
    description: str
    unit: str = SHARE_OF_ATTENTION

    def word(self, word: int | str) -> HeatMap:
        """The map of one word.

        Args:
            word: Its index in `words`, or its text. The maps of all occurrences of a text are summed.

        Raises:
            ValueError: The question does not have the word.
        """
        if isinstance(word, int):
            chosen = [word]
        else:
            chosen = [i for i, known in enumerate(self.words) if known.text.lower() == word.lower()]
        if not chosen:
            known_words = [w.text for w in self.words if not w.special]
            raise ValueError(f"The question does not have the word {word!r}. Use one of {known_words}.")
        return self._heat_map(chosen, f"“{self.words[chosen[0]].text}”")

    def question(self) -> HeatMap:
        """The sum of the maps of all words, without special tokens."""
        return self._heat_map([i for i, word in enumerate(self.words) if not word.special], "the question's words")

    def _heat_map(self, words: list[int], label: str) -> HeatMap:
        grid = self.maps[words].sum(axis=0)
        values = map_onto_image(grid, self.image.size)
        return HeatMap(values, grid, self.image, label, self.unit, self.description)


def words_in_prompt(
    tokenizer: PreTrainedTokenizerBase, input_ids: Sequence[int], num_tokens: int | None = None
) -> list[Word]:
    """The words of a tokenized prompt, with sub-word tokens joined.

    Args:
        tokenizer: CLIP's, which marks the end of a word with `</w>`, or T5's, which marks its beginning with `▁`.
        input_ids: Token ids of one prompt, with begin, end and padding.
        num_tokens: Length of the prompt in the denoiser. It is longer where tokens without text follow.
    """
    ids = [int(i) for i in input_ids]
    end = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else len(ids)
    words = [Word("<begin>", (0,), True)] if ids[:1] == [tokenizer.bos_token_id] else []
    pieces: list[int] = []
    tokens = tokenizer.convert_ids_to_tokens(ids[:end])
    for position in range(len(words), end):
        pieces.append(position)
        ends_here = tokens[position].endswith("</w>") or position == end - 1
        if ends_here or tokens[position + 1].startswith("▁"):
            text = tokenizer.decode([ids[i] for i in pieces]).strip()
            words.append(Word(text, tuple(pieces), False))
            pieces = []
    total = max(len(ids), num_tokens or 0)
    spans = {"<end>": (end, end + 1), "<padding>": (end + 1, len(ids)), "<no text>": (len(ids), total)}
    special = {text: tuple(range(start, min(stop, total))) for text, (start, stop) in spans.items()}
    return words + [Word(text, tokens, True) for text, tokens in special.items() if tokens]


def prompt_tokenizers(tower: SDLlavaDiffusionModel, processor: SDLlavaProcessor) -> list[PreTrainedTokenizerBase]:
    """The tokenizers whose tokens the denoiser attends to, in their order."""
    found = [getattr(processor, name, None) for name in TOKENIZERS]
    return [found[index] for index in tower.config.family.prompt_tokenizers if found[index] is not None]


def _words_of_prompt(
    tokenizers: Sequence[PreTrainedTokenizerBase], prompt: Sequence[torch.Tensor], num_tokens: int
) -> list[Word]:
    words: list[Word] = []
    start = 0
    for number, (tokenizer, ids) in enumerate(zip(tokenizers, prompt, strict=True), start=1):
        length = num_tokens - start if number == len(prompt) else len(ids)
        found = words_in_prompt(tokenizer, ids.tolist(), length)
        words += [replace(word, tokens=tuple(start + token for token in word.tokens)) for word in found]
        start += len(ids)
    return words


def join_words(maps: torch.Tensor, words: Sequence[Word]) -> np.ndarray:
    """Token maps `(tokens, h, w)` as word maps `(words, h, w)`, float32, summed over the tokens of each word."""
    return np.stack([maps[list(word.tokens)].sum(dim=0).float().numpy() for word in words])


def concept_shares(products: torch.Tensor, words: Sequence[Word]) -> np.ndarray:
    """Softmax over words of products of outputs `(tokens, h, w)`, as in ConceptAttention (arXiv 2502.04320).

    A word's product is the mean over its tokens. Special tokens have no share.

    Returns:
        `np.ndarray` of shape `(words, h, w)`, float32: Over words it sums to one.
    """
    chosen = [index for index, word in enumerate(words) if not word.special]
    means = torch.stack([products[list(words[index].tokens)].float().mean(dim=0) for index in chosen])
    shares = np.zeros((len(words), *products.shape[1:]), dtype=np.float32)
    shares[chosen] = means.softmax(dim=0).numpy()
    return shares


def map_onto_image(grid: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """A map over the padded square, enlarged (bilinear) and cropped to the image.

    Args:
        grid (`np.ndarray` of shape `(side, side)`): Over the square that [`~sdllava.image_loading.pad_to_square`] made.
        image_size: Width and height of the image in pixels.

    Returns:
        `np.ndarray` of shape `(height, width)`, float32.
    """
    width, height = image_size
    side = max(width, height)
    square = F.interpolate(torch.as_tensor(grid).float()[None, None], (side, side), mode="bilinear")[0, 0]
    top, left = (side - height) // 2, (side - width) // 2
    return square[top : top + height, left : left + width].numpy()


def drawn_part(grid: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """The values of a map without the padding: the map itself for a square image, else [`map_onto_image`]."""
    width, height = image_size
    return grid if width == height else map_onto_image(grid, image_size)


def attention_by_word(
    maps: AttentionMaps,
    tokenizers: Sequence[PreTrainedTokenizerBase],
    images: Sequence[Image.Image],
    resolution: int | None = None,
    layers: Sequence[str] | None = None,
    timesteps: Sequence[int] | None = None,
) -> list[QuestionAttention]:
    """Captured maps, averaged at one resolution and joined to words, one entry per image.

    Args:
        maps: From `tower.capture_attention()`, of a call with `input_ids`.
        tokenizers: From [`prompt_tokenizers`].
        images: Upright RGB, not padded.
        resolution: See [`~sdllava.attention_maps.AttentionMaps.average`].
        layers: Only these. Default: all.
        timesteps: Only these. Default: all.

    Raises:
        ValueError: The maps are not those of one prompt per image, or no layer has the resolution.
    """
    mean = maps.average(resolution, layers, timesteps)
    used = [
        layer
        for layer in maps.layers
        if (layers is None or layer in layers) and maps[layer, maps.timesteps[0]].shape[-1] == mean.shape[-1]
    ]
    times = ", ".join(str(timestep) for timestep in timesteps or maps.timesteps)
    description = f"{', '.join(used)} ({mean.shape[-1]}×{mean.shape[-1]}), t = {times}"
    prompts = list(zip(*maps.prompt_ids, strict=True))
    if len(prompts) != len(images):
        raise ValueError(f"{len(prompts)} captured prompts do not fit {len(images)} images. Give one image per prompt.")
    found = []
    for ids, image, tokens in zip(prompts, images, mean, strict=True):
        words = _words_of_prompt(tokenizers, ids, len(tokens))
        if maps.of_outputs:
            shares, unit = concept_shares(tokens, words), SHARE_OF_WORDS
        else:
            shares, unit = join_words(tokens, words), SHARE_OF_ATTENTION
        found.append(QuestionAttention(words, shares, image, description, unit))
    return found


def capture_question(
    tower: SDLlavaDiffusionModel,
    processor: SDLlavaProcessor,
    image: Image.Image,
    question: str,
    layers: Sequence[str] | None = None,
    timesteps: Sequence[int] | None = None,
    concepts: bool = False,
) -> AttentionMaps:
    """The attention to one question over one image, by layer and timestep.

    Args:
        tower: The diffusion model.
        processor: Its processor.
        image: Upright RGB.
        question: The prompt.
        layers: Transformer blocks, for example `["U-L1-R1-B0"]`. Default: all that run.
        timesteps: Noise levels in 0..999. Default: the configured ones.
        concepts: See `tower.capture_attention`.

    Raises:
        ValueError: The question is empty, or a layer does not run or has no concept maps.
    """
    question = check_question(question)
    reader = reconfigure(tower, timesteps=timesteps, guidance_scales=[1.0])
    reader.config.conditioning = "question"
    inputs = processor(images=image, question=question, return_tensors="pt").to(reader.backbone.prompt_weight.device)
    ids = [inputs[name] for name in INPUT_IDS if name in inputs]
    with torch.no_grad(), reader.capture_attention(layers, concepts=concepts) as maps:
        reader(inputs["diffusion_pixel_values"], *ids)
    return maps


def question_attention(
    tower: SDLlavaDiffusionModel,
    processor: SDLlavaProcessor,
    image: ImageLike,
    question: str,
    layers: Sequence[str] | None = None,
    timesteps: Sequence[int] | None = None,
    resolution: int | None = None,
) -> QuestionAttention:
    """The maps of [`capture_question`], averaged over layers and timesteps and joined to words.

    Args:
        tower: The diffusion model.
        processor: Its processor.
        image: Anything that [`~sdllava.image_loading.load_rgb`] reads.
        question: The prompt.
        layers: Transformer blocks. Default: all that run.
        timesteps: Noise levels in 0..999. Default: the configured ones.
        resolution: Height of the maps to average. Default: [`default_resolution`].

    Raises:
        ValueError: The question is empty, or a layer does not run.
    """
    image = load_rgb(image)
    maps = capture_question(tower, processor, image, question, layers, timesteps)
    resolution = default_resolution(maps, tower) if resolution is None else resolution
    return attention_by_word(maps, prompt_tokenizers(tower, processor), [image], resolution)[0]


def default_resolution(maps: AttentionMaps, tower: SDLlavaDiffusionModel) -> int:
    """A quarter of the latents' height, 16 for the papers' model (S3, 4.1), or the nearest that was captured."""
    quarter = tower.config.latent_size // 4
    return min(maps.resolutions, key=lambda size: (abs(size - quarter), size))


def question_heatmap(
    model: SDLlavaForConditionalGeneration,
    processor: SDLlavaProcessor,
    image: ImageLike,
    question: str,
    image_encodings: SDLlavaImageEncodings | None = None,
) -> HeatMap:
    """The attention to all words of a question, averaged over the layers at [`default_resolution`].

    Args:
        model: A model with a diffusion tower.
        processor: Its processor.
        image: Anything that [`~sdllava.image_loading.load_rgb`] reads.
        question: The prompt.
        image_encodings: From `model.encode_images` on this image. The call then needs one conditional pass.

    Raises:
        ValueError: The model does not have a diffusion tower, or always uses the empty prompt.
    """
    return model_attention(model, processor, image, question, image_encodings).question()


def model_attention(
    model: SDLlavaForConditionalGeneration,
    processor: SDLlavaProcessor,
    image: ImageLike,
    question: str,
    image_encodings: SDLlavaImageEncodings | None = None,
) -> QuestionAttention:
    """The attention to each word of a question; arguments and errors as for [`question_heatmap`]."""
    tower = model.base_model.diffusion_tower
    if tower is None:
        raise ValueError(f"{model.name_or_path!r} does not have a diffusion tower. Use a model that has one.")
    if tower.config.conditioning == "none":
        raise ValueError(
            f"{model.name_or_path!r} has conditioning='none': its diffusion tower only reads the empty prompt. Use a "
            "model with conditioning='question'."
        )
    image = load_rgb(image)
    inputs = dict(processor(images=image, question=question, return_tensors="pt").to(model.device))
    if image_encodings is not None:
        inputs = {name: x for name, x in inputs.items() if not name.endswith("pixel_values")}
        inputs["image_encodings"] = image_encodings
    with torch.no_grad(), tower.capture_attention() as maps:
        scales = [1.0] * len(tower.config.guidance_scales)
        model.get_image_features(**inputs, diffusion_guidance_scales=scales)
    tokenizers = prompt_tokenizers(tower, processor)
    found = attention_by_word(maps, tokenizers, [image], default_resolution(maps, tower))[0]
    name = short_name(model.name_or_path)
    return replace(found, description=f"{name}, {found.description}") if name else found
