"""The small Llama, trained on symbolic scenes: each image token is the sum of the embeddings of an object's words.

Training follows a curriculum, because finding an object by its colour is learnt suddenly, and only from enough
questions of that kind. In its first phases each token also has a position vector. In the last phase it does not,
because a vision encoder's tokens need not encode their positions. The questions about a scene are packed after one
image, and a mask separates them.
"""

import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from sdllava.scenes.language import KINDS, ask, caption, sample_question
from sdllava.scenes.world import CELLS, PATTERNS, Scene, sample_scene

from .loop import mixed_precision, scene_numbers
from .text import llm_tokenizer, words_in

GRID = 4
QUESTIONS_PER_SCENE = 8
_CAPTION_EVERY = 5


@dataclass(frozen=True)
class Phase:
    """A phase of the curriculum.

    Args:
        until: The share of the budget, in (0, 1], at which the phase ends.
        patterns: The patterns of its questions. A pattern that is named twice is twice as frequent.
        kinds: The kinds of its questions.
        placed: Whether a learnt position vector is added to each symbolic token.
    """

    until: float
    patterns: tuple[str, ...] = PATTERNS
    kinds: tuple[str, ...] = KINDS
    placed: bool = True


_HARD = ("position", "colour", "count", "presence")
_BY_CELL = ("colour at", "shape at", "where")
CURRICULUM = (
    Phase(0.025, ("structure",)),
    Phase(0.05, ("structure", "colour", "text")),
    Phase(0.19),
    Phase(0.325, (*PATTERNS, *_HARD * 2, "orientation", "structure")),
    Phase(0.375, ("position", "colour", "structure"), _BY_CELL),
    Phase(0.42, ("orientation", "count", "colour"), ("points", "how many of", *_BY_CELL)),
    Phase(0.625, (*PATTERNS, *_HARD, "orientation", "structure")),
    Phase(1.0, (*PATTERNS, *_HARD * 2, "position", "position", "orientation", "structure"), placed=False),
)


class SymbolicLlama(nn.Module):
    """A Llama, and one learnt position vector per cell of the grid of symbolic tokens.

    Args:
        config: The Llama's configuration.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.llama = LlamaForCausalLM(config)
        self.places = nn.Parameter(torch.randn(GRID * GRID, config.hidden_size) * config.initializer_range)


def llama_config(hidden_size: int, layers: int, heads: int) -> LlamaConfig:
    """The configuration of a Llama with the scenes' vocabulary.

    Args:
        hidden_size: Channels.
        layers: Layers.
        heads: Attention heads.
    """
    tokenizer = llm_tokenizer()
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def scene_words(scene: Scene) -> list[list[str]]:
    """The words of the 4x4 symbolic tokens: the viewpoint in all, and an object's in the four of its quadrant."""
    words = [[scene.viewpoint] for _ in range(GRID * GRID)]
    for item in scene.objects:
        row, column = divmod(CELLS.index(item.cell), 2)
        attributes = [item.colour, item.shape, item.state, item.direction, item.letter]
        attributes.append("border" if item.border else "")
        for place in (8 * row + 2 * column + step for step in (0, 1, GRID, GRID + 1)):
            words[place] += [word for word in attributes if word]
    return words


class LlamaPart:
    """Trains the Llama to caption symbolic scenes and to answer questions about them.

    Args:
        config: The Llama's configuration.
        steps: The steps of the budget, to which the curriculum is scaled.
        seed: Selects scenes and questions.
    """

    name = "llm"

    def __init__(self, config: LlamaConfig, steps: int, seed: int = 0):
        self.model, self.steps, self.seed = SymbolicLlama(config), steps, seed
        self.model.llama.set_attn_implementation("eager")  # on a CPU faster in training than the fused kernel
        self.tokenizer = llm_tokenizer()
        self.vocabulary = self.tokenizer.get_vocab()

    def _ids(self, text: str) -> list[int]:
        return [self.vocabulary[word] for word in words_in(text)]

    def _image(self, scenes: list[Scene], placed: bool = False) -> Tensor:
        """Symbolic image tokens `(n_scenes, 16, hidden_size)`."""
        places = [[self.vocabulary[word] for word in words] for scene in scenes for words in scene_words(scene)]
        device = self.model.places.device
        flat = torch.tensor([word for place in places for word in place], device=device)
        offsets = torch.tensor([0, *(len(place) for place in places[:-1])], device=device).cumsum(0)
        table = self.model.llama.get_input_embeddings().weight
        sums = nn.functional.embedding_bag(flat, table, offsets, mode="sum")
        tokens = sums.view(len(scenes), GRID * GRID, -1)
        return tokens + self.model.places if placed else tokens

    def phase(self, step: int) -> Phase:
        """The curriculum's phase at a step."""
        return next(phase for phase in CURRICULUM if step < phase.until * self.steps)

    def _turns(self, scene: Scene, step: int, rng: random.Random) -> tuple[str, list[tuple[str, str]]]:
        """The text before the image, and the (prompt, answer) pairs after it."""
        if step % _CAPTION_EVERY == 0:
            return "", [("", caption(scene))]
        phase = self.phase(step)
        questions = (ask(scene, rng, phase.patterns, phase.kinds) for _ in range(QUESTIONS_PER_SCENE))
        unique = {question.text: question.answer for question in questions if question}
        return "user:", [(f"{text} assistant:", answer) for text, answer in unique.items()]

    def loss(self, step: int, batch_size: int) -> Tensor:
        """The mean next-token loss over the answers to the packed questions of this step's scenes."""
        numbers = scene_numbers(self.seed, step, batch_size)
        scenes = [sample_scene("train", number) for number in numbers]
        packed = []
        for number, scene in zip(numbers, scenes, strict=True):
            before, turns = self._turns(scene, step, random.Random(f"turns {number}"))
            ids = [(self._ids(prompt), [*self._ids(answer), self.vocabulary["</s>"]]) for prompt, answer in turns]
            packed.append(pack([self.vocabulary["<s>"], *self._ids(before)], ids))
        tokens, labels, positions, segments = (
            nn.utils.rnn.pad_sequence(list(column), batch_first=True, padding_value=fill).to(self.model.places.device)
            for column, fill in zip(zip(*packed, strict=True), (0, -100, 0, -1), strict=True)
        )
        start = int((tokens[0] == -1).nonzero()[0])
        embeddings = self.model.llama.get_input_embeddings()(tokens.clamp(min=0))
        image = self._image(scenes, self.phase(step).placed)
        embeddings = torch.cat([embeddings[:, :start], image, embeddings[:, start + image.shape[1] :]], dim=1)
        mask = torch.where(packed_mask(segments), 0.0, torch.finfo(torch.float32).min)[:, None]
        predicts = labels[:, 1:] != -100
        with mixed_precision(mask.device):
            decoder = self.model.llama.model
            hidden = decoder(inputs_embeds=embeddings, attention_mask=mask, position_ids=positions).last_hidden_state
            logits = self.model.llama.lm_head(hidden[:, :-1][predicts])
        return nn.functional.cross_entropy(logits.float(), labels[:, 1:][predicts])

    @torch.no_grad()
    def answers(self, scenes: list[Scene], questions: list[str]) -> list[str]:
        """Greedy answers, one per pair of scene and question."""
        llama, end = self.model.llama, self.vocabulary["</s>"]
        embed = llama.get_input_embeddings()
        image, found = self._image(scenes), []
        for row, question in enumerate(questions):
            before = image.new_tensor([self.vocabulary["<s>"], *self._ids("user:")], dtype=torch.long)
            after = image.new_tensor(self._ids(f"{question} assistant:"), dtype=torch.long)
            inputs = torch.cat([embed(before), image[row], embed(after)])[None]
            ids = llama.generate(inputs_embeds=inputs, max_new_tokens=4, do_sample=False, pad_token_id=end)
            found.append(self.tokenizer.decode(ids[0], skip_special_tokens=True))
        return found

    def check(self, count: int, split: str = "validation") -> dict[str, float]:
        """The share of correct answers on held-out symbolic scenes, in total and by pattern."""
        sampled = [sample_question(split, number) for number in range(count)]
        answers = self.answers([scene for scene, _ in sampled], [question.text for _, question in sampled])
        correct = defaultdict(list)
        for (_, question), answer in zip(sampled, answers, strict=True):
            correct[question.pattern].append(answer == question.answer)
        every = [value for values in correct.values() for value in values]
        return {"accuracy": sum(every) / count} | {p: sum(v) / len(v) for p, v in sorted(correct.items())}

    def write(self, folder: str | Path) -> None:
        """Write `llm/`: the Llama and its tokenizer, in transformers' layout."""
        self.model.llama.save_pretrained(Path(folder) / "llm")
        self.tokenizer.save_pretrained(Path(folder) / "llm")


def pack(before: list[int], turns: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pack one image and several turns into a sequence.

    Args:
        before: Token ids before the image.
        turns: The ids of each turn's prompt and answer.

    Returns:
        `tuple`: Ids (-1 for an image token), labels (-100 outside answers), positions and segments, each `(length,)`.
        The image and the ids before it are segment 0, which all tokens attend to. Turn n is segment n, which only its
        own tokens attend to. The positions of every turn begin after the image's.
    """
    shared = [*before, *[-1] * (GRID * GRID)]
    ids, labels, positions, segments = list(shared), [-100] * len(shared), list(range(len(shared))), [0] * len(shared)
    for number, (prompt, answer) in enumerate(turns, start=1):
        length = len(prompt) + len(answer)
        ids += [*prompt, *answer]
        labels += [-100] * len(prompt) + answer
        positions += range(len(shared), len(shared) + length)
        segments += [number] * length
    return torch.tensor(ids), torch.tensor(labels), torch.tensor(positions), torch.tensor(segments)


def packed_mask(segments: Tensor) -> Tensor:
    """Which token attends to which, `(n, length, length)`: to itself, and to earlier ones of its segment and of 0."""
    same = (segments[:, :, None] == segments[:, None, :]) | (segments[:, None, :] == 0)
    length = segments.shape[1]
    return same & torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
