"""What happens on the demo page. Each user's images, question and history are kept in their session only."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import gradio as gr
import numpy as np
from PIL import Image

from ..analysis.attention import QuestionAttention, drawn_part
from ..analysis.features import DeltaMap
from ..commands.reporting import PHOTOGRAPH
from ..scenes.language import sample_question
from ..scenes.render import looks_rendered, render
from .drawing import Answer, answers_html, maps_html, pictures_html, problem_html
from .engine import EncodedImages, Engine, check_length, open_uploads
from .words import content_words

WHOLE = "whole question"
"""Stands for all words of a question."""
NUM_EXAMPLES = 6
OPENING_SECONDS = 20.0
"""How long the page looks for its opening example."""
SEVERAL = "Answers about several images are poor unless the model was trained on several."
NO_IMAGE = "Open an image first: choose an example, or upload one."


@dataclass(frozen=True)
class Example:
    """A rendered scene with a question and its answer."""

    image: Image.Image
    question: str
    answer: str


@dataclass
class OpenImages:
    """The images of a session.

    Args:
        encoded ([`EncodedImages`]): For each checkpoint.
        example ([`Example`], *optional*): Where the image is an example.
    """

    encoded: list[EncodedImages]
    example: Example | None = None


@dataclass
class CurrentQuestion:
    """The question of a session.

    Args:
        text (`str`): The question.
        shown (`int`): The checkpoint whose maps the page shows.
        attention (`list[QuestionAttention]`): The attention maps of its words, for each image.
        delta ([`DeltaMap`]): Its effect on the features.
        answered_at (`float`, *optional*): The guidance scale of its last answers.
    """

    text: str
    shown: int
    attention: list[QuestionAttention]
    delta: DeltaMap
    answered_at: float | None = None

    def words(self) -> dict[str, list[int]]:
        """The words that have a map on the page, with the indices of their maps."""
        words = self.attention[0].words
        return {WHOLE: [i for i, word in enumerate(words) if not word.special], **content_words(words)}

    def shares(self, word: str) -> list[np.ndarray]:
        """The share of attention of a word over each image, summed over its occurrences."""
        return [attention.maps[self.words()[word]].sum(axis=0) for attention in self.attention]

    def relative(self, word: str) -> list[np.ndarray]:
        """The map of a word over each image, relative to its mean over that image."""
        shares, tiny = self.shares(word), float(np.finfo(np.float32).tiny)
        return [grid / max(float(part.mean()), tiny) for grid, part in zip(shares, self.drawn(shares), strict=True)]

    def brightest(self) -> float:
        """The largest relative value of all words: the maps of a question have one scale."""
        return max(self.largest(self.relative(word)) for word in self.words())

    def drawn(self, grids: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The values of a map over each image, without the padding."""
        return [drawn_part(grid, a.image.size) for grid, a in zip(grids, self.attention, strict=True)]

    def largest(self, grids: Sequence[np.ndarray]) -> float:
        """The largest value of a map over the images, without the padding."""
        return max(float(part.max()) for part in self.drawn(grids))


@dataclass
class Opening:
    """What the page shows before a visitor does anything: the values of its components."""

    images: OpenImages
    current: CurrentQuestion
    picture: str
    attention: str
    effect: str
    answers: str
    history: list[list[str]]


def examples() -> list[Example]:
    """Rendered scenes with questions."""
    drawn = [sample_question("test", seed) for seed in range(NUM_EXAMPLES)]
    return [Example(render(scene), question.text, question.answer) for scene, question in drawn]


def is_right(answer: str, expected: str) -> bool:
    """Whether an answer is the expected word, in any case, with or without a full stop."""
    return answer.strip(" .").casefold() == expected.casefold()


class Page:
    """The page's events, one method per event.

    The state of a session is its `OpenImages`, its `CurrentQuestion` and its history.

    Args:
        engines: The loaded checkpoints. The first one has a diffusion tower; others are compared with it.

    Raises:
        ValueError: The first model has no diffusion tower that reads the question.
    """

    def __init__(self, engines: Sequence[Engine]):
        if not engines[0].has_maps:
            name = engines[0].name
            raise ValueError(f"{name!r} has no diffusion tower that reads the question. Use a model that has one.")
        self.engines = list(engines)
        self.examples = examples()

    @property
    def headers(self) -> list[str]:
        """The columns of the history."""
        return ["question", "s", *self._who()]

    def _who(self) -> list[str]:
        """Who answers: each checkpoint, and the first one without its diffusion features."""
        main, *others = self.engines
        prefixes = [f"{engine.name}: " if others else "" for engine in self.engines]
        names = [prefix + engine.encoders for prefix, engine in zip(prefixes, self.engines, strict=True)]
        names = [name[0].upper() + name[1:] if not others else name for name in names]
        only = [f"{prefixes[0]}{main.vision_encoder} only"] if main.vision_encoder else []
        return names[:1] + only + names[1:]

    def open_first(self) -> Opening:
        """The page as it opens: an example that the model answers and its vision encoder does not, with its answers.

        The examples are tried in turn for at most `OPENING_SECONDS`. The first one opens if none is found.
        """
        began, scale = time.monotonic(), self.engines[0].guidance_scale or 1.0
        found: tuple[Example, list[str]] | None = None
        for example in self.examples:
            images = OpenImages([engine.encode([example.image]) for engine in self.engines], example)
            said = [list(stream)[-1] for stream in self._streams(images, example.question, scale)]
            model, vision_only = said[0], said[1] if self.engines[0].vision_encoder else ""
            is_telling = is_right(model, example.answer) and not is_right(vision_only, example.answer)
            if found is None or is_telling:
                found = example, said
            is_untrained = self.engines[0].model.config.is_trained is False
            if is_telling or is_untrained or time.monotonic() - began > OPENING_SECONDS:
                break
        assert found is not None
        example, said = found
        images, _, picture, *_ = self._open([example.image], example)
        current, _, attention, effect, *_ = self.ask(images, example.question, scale, 0)
        current.answered_at = scale
        answers = answers_html(self._answers(said, example.answer), example.answer)
        history = [[example.question, f"{scale:g}", *said]]
        return Opening(images, current, picture, attention, effect, answers, history)

    def upload(self, files: list[bytes] | None) -> tuple:
        """Open uploaded images."""
        if not files:
            return (gr.skip(),) * 11
        try:
            images = open_uploads(files, self.engines[0].limits)
        except (ValueError, OSError) as error:
            return (*(gr.skip(),) * 8, None, problem_html(str(error)), gr.skip())
        return self._open(images)

    def choose_example(self, event: gr.SelectData) -> tuple:
        """Open an example with its question."""
        example = self.examples[event.index]
        return self._open([example.image], example)

    def _open(self, images: list[Image.Image], example: Example | None = None) -> tuple:
        """Show new images, and clear the results of the previous ones."""
        encoded = [engine.encode(images) for engine in self.engines]
        sizes = ", ".join(f"{image.width} x {image.height}" for image in images)
        caption = "A rendered scene" if example else f"Your image{'s' * (len(images) > 1)}, {sizes}"
        warnings = [SEVERAL] if len(images) > 1 else []
        if any(engine.scenes_only for engine in self.engines) and not all(map(looks_rendered, images)):
            warnings.append(PHOTOGRAPH[0].upper() + PHOTOGRAPH[1:])
        question = example.question if example else gr.skip()
        picture = pictures_html(images, caption, warnings)
        no_words = gr.update(choices=[], value=None, visible=False)
        return OpenImages(encoded, example), question, picture, None, no_words, "", "", "", None, "", ""

    def ask(self, opened: OpenImages | None, question: str, scale: float, shown: int) -> tuple:
        """Compute the attention maps of a question and its effect on the features, or say what is missing.

        Args:
            opened: The images.
            question: The question.
            scale: The guidance scale of the first checkpoint.
            shown: The checkpoint whose maps the page shows.
        """
        image_problem, question_problem = "" if opened else NO_IMAGE, ""
        try:
            question = check_length(question, self.engines[0].limits)
        except ValueError as error:
            question_problem = "Type a question." if not question.strip() else str(error)
        field = gr.update(elem_classes=["invalid"] if question_problem else [])
        marks = (field, problem_html(question_problem), problem_html(image_problem))
        if opened is None or question_problem:
            return (*(gr.skip(),) * 4, *marks)
        engine, encoded = self.engines[shown], opened.encoded[shown]
        current = CurrentQuestion(question, shown, engine.attention(encoded, question), engine.delta(encoded, question))
        words = gr.update(choices=list(current.words()), value=WHOLE, visible=True)
        return (current, words, self.choose_word(current, WHOLE), self._effect(current, scale), *marks)

    def answers(
        self, opened: OpenImages | None, current: CurrentQuestion | None, scale: float, history: list
    ) -> Iterator[tuple]:
        """Show the effect at the scale of the answers, stream them, then add them to the history.

        Nothing happens if the question has these answers already.
        """
        if opened is None or current is None or current.answered_at == scale:
            yield (gr.skip(),) * 3
            return
        yield gr.skip(), gr.skip(), self._effect(current, scale)
        example = opened.example
        expected = example.answer if example and example.question == current.text else None
        said: list[str] = []
        for stream in self._streams(opened, current.text, scale):
            said.append("…")
            for text in stream:
                said[-1] = text
                yield answers_html(self._answers(said), expected), gr.skip(), gr.skip()
        current.answered_at = scale
        html = answers_html(self._answers(said, expected), expected)
        yield html, [[current.text, f"{scale:g}", *said], *history], gr.skip()

    def _answers(self, said: list[str], expected: str | None = None) -> list[Answer]:
        """Answers with who gave them, judged if the right answer is given."""
        judged = [None if expected is None else is_right(text, expected) for text in said]
        return [Answer(*row) for row in zip(self._who(), said, judged, strict=False)]

    def _streams(self, opened: OpenImages, question: str, scale: float) -> Iterator[Iterator[str]]:
        """The streamed answers, in the order of `_who`. Others than the first have their configured scales."""
        main, *others = self.engines
        first, *encoded = opened.encoded
        yield main.answer(first, question, None if main.guidance_scale is None else scale)
        if main.vision_encoder:
            yield main.answer_without_diffusion(first, question)
        for engine, images in zip(others, encoded, strict=True):
            yield engine.answer(images, question)

    def choose_word(self, current: CurrentQuestion | None, word: str | None) -> str:
        """Show where the diffusion model reads for a word."""
        if current is None or word is None:
            return ""
        text = "the question" if word == WHOLE else f"“{word}”"
        grids, high = current.relative(word), current.brightest()
        here = current.largest(grids)
        share = float(current.drawn(current.shares(word))[0].mean())
        return maps_html(
            [attention.image for attention in current.attention], grids, high,
            f"Where the diffusion model reads for {text}: up to {here:.1f} times its average.",
            f"{high:.1f} times the average",
            f"The share of attention of a word, relative to its mean over the image ({share:.1%} here). All words of a "
            f"question have one scale. {current.attention[0].description}",
        )  # fmt: skip

    def move_slider(self, current: CurrentQuestion | None, scale: float) -> str:
        """Show the effect of the question at another guidance scale."""
        return "" if current is None else self._effect(current, scale)

    def _effect(self, current: CurrentQuestion, scale: float) -> str:
        """|s (X_c - X_u)|. The scale of the picture does not depend on s, so that the slider's effect is visible."""
        configured = self.engines[current.shown].guidance_scale or 1.0
        scale = scale if current.shown == 0 else configured
        delta = current.delta
        largest = current.largest(list(delta.heat))
        high = largest * configured
        return maps_html(
            [attention.image for attention in current.attention], list(delta.heat * scale), high,
            f"Where the question changes the features at guidance scale {scale:g}: by up to "
            f"{largest * scale:.0%} of their length.",
            f"{high:.0%}",
            f"|s (X_c - X_u)| relative to the mean |X_u|, at tap {delta.tap}, t = {delta.timestep}. The picture's "
            "scale is that of the configured guidance.",
        )  # fmt: skip
