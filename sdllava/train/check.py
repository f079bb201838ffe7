"""Checking a whole data set without training on it, and reporting its contents and its errors."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..data.images import open_image
from ..data.records import Record, RecordError
from .collator import SDLlavaCollator
from .tokens import IGNORED, Tokens, max_tokens_before_supervision, tokenize_record

if TYPE_CHECKING:
    from ..processors import SDLlavaProcessor

N_UNKNOWN = 50
"""Unknown words that a report names, the most frequent ones."""


@dataclass
class DataReport:
    """The result of `check_data`. Lengths are in tokens, including image tokens, before any truncation."""

    samples: int = 0
    images: int = 0
    text_only: int = 0
    answers: int = 0
    supervised: int = 0
    lengths: list[int] = field(default_factory=list)
    truncated: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    unknown: Counter[str] = field(default_factory=Counter)
    shown: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """The report as text. It names every unreadable and every truncated sample."""
        lines = [
            f"{self.samples} samples, {self.images} images, {self.text_only} samples without an image, "
            f"{self.answers} answers, {self.supervised} supervised tokens"
        ]
        if self.lengths:
            lengths = sorted(self.lengths)
            ranks = {"shortest": 0, "median": len(lengths) // 2, "95%": int(0.95 * (len(lengths) - 1)), "longest": -1}
            lines.append("tokens: " + ", ".join(f"{name} {lengths[rank]}" for name, rank in ranks.items()))
        lines.append(f"{len(self.truncated)} truncated, {len(self.bad)} unreadable")
        if self.unknown:
            words = ", ".join(f"{word} ({count})" for word, count in self.unknown.most_common(N_UNKNOWN))
            more = f", and {len(self.unknown) - N_UNKNOWN} more" if len(self.unknown) > N_UNKNOWN else ""
            lines.append(
                f"{self.unknown.total()} words of answers are unknown to the tokenizer, so the model cannot learn to "
                f"write them: {words}{more}"
            )
        lines += [f"truncated: {name}" for name in self.truncated] + [f"unreadable: {name}" for name in self.bad]
        return "\n".join([*self.shown, *lines])


def check_data(rows: Iterable[Mapping[str, Any]], collator: SDLlavaCollator, n_shown: int = 3) -> DataReport:
    """Read every row with its images, as training would.

    Args:
        rows: The data.
        collator: The collator of the run.
        n_shown: The number of samples in the report, with the supervised tokens in [[double brackets]].
    """
    report = DataReport()
    for number, row in enumerate(rows):
        report.samples += 1
        name = row.get("name") or f"sample {number}"
        try:
            record = collator.record(row, number)
            full = tokenize_record(collator.processor, record, collator.template)
            report.lengths.append(len(full.input_ids))
            tokens = collator.tokens(record)
            for image in record["images"]:
                open_image(image, record["folder"])
        except RecordError as error:
            report.bad.append(f"{name} {error}")
            continue
        if len(tokens.input_ids) < len(full.input_ids):
            report.truncated.append(f"{name} has {len(full.input_ids)} tokens")
        report.images += len(record["images"])
        report.text_only += not record["images"]
        report.answers += sum(message["role"] == "assistant" for message in record["messages"])
        if collator.processor.tokenizer.unk_token_id in set(tokens.labels):
            report.unknown.update(unknown_words(collator.processor, record))
        report.supervised += sum(label != IGNORED for label in tokens.labels)
        if len(report.shown) < n_shown:
            report.shown.append(f"{name}: {mark_supervised(collator.processor, tokens)}")
    return report


def unknown_words(processor: "SDLlavaProcessor", record: Record) -> Iterator[str]:
    """The words of a record's answers that the tokenizer encodes as its unknown token."""
    tokenizer: Any = processor.tokenizer
    for message in record["messages"]:
        if message["role"] == "assistant":
            for word in message["content"].split():
                if tokenizer.unk_token_id in tokenizer(word, add_special_tokens=False)["input_ids"]:
                    yield word


def mark_supervised(processor: "SDLlavaProcessor", tokens: Tokens) -> str:
    """The text of a sample, with supervised tokens in [[double brackets]] and runs of image tokens counted."""
    pieces, start = [], 0
    ids = tokens.input_ids
    kinds = [
        (token == processor.image_token_id, label != IGNORED) for token, label in zip(ids, tokens.labels, strict=True)
    ]
    for end in range(1, len(ids) + 1):
        if end == len(ids) or kinds[end] != kinds[start]:
            is_image, is_supervised = kinds[start]
            text = f"{processor.image_token}*{end - start}" if is_image else processor.tokenizer.decode(ids[start:end])
            pieces.append(f"[[{text}]]" if is_supervised else text)
            start = end
    return "".join(pieces)


def require_supervision(rows: Iterable[Mapping[str, Any]], collator: SDLlavaCollator) -> None:
    """Check that every sample is valid and has a supervised token. Tokenizes only samples that may be too long.

    Raises:
        ValueError: A sample is not valid; the message names the first one. With `skip_bad_samples`, only where no
            sample is valid, or too many are not. Also where the chat template leaves the end token out of the answers.
    """
    usable = number = fixed = 0
    limit = collator.max_length or float("inf")
    for number, row in enumerate(rows):
        try:
            record = collator.record(row, number)
            if usable == 0 or max_tokens_before_supervision(collator.processor, record, fixed) > limit:
                tokens = collator.tokens(record)
                if usable == 0:
                    _require_end_token(collator, tokens)
                    fixed = len(tokens.input_ids)
            usable += 1
        except RecordError as error:
            if not collator.skip_bad_samples:
                name = row.get("name") or f"sample {number}"
                raise ValueError(f"{name} {error}. List every such sample with --check_data true.") from error
    if not usable:
        raise ValueError("The data has no usable sample. Run with --check_data true to see why.")
    collator.check_skipped(number + 1 - usable, number + 1)


def _require_end_token(collator: SDLlavaCollator, tokens: Tokens) -> None:
    tokenizer: Any = collator.processor.tokenizer
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special -= {tokenizer.bos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id}
    ends = {tokenizer.eos_token_id} | special  # Gemma ends its answers with another token than its eos_token
    if not ends & set(tokens.labels) and len(tokens.input_ids) != collator.max_length:
        raise ValueError(
            f"The chat template leaves the end token {tokenizer.eos_token!r} out of the marked answers, so the model "
            "would not learn to stop. Give a template that includes it (chat_template_path)."
        )
