"""The words of a question that are worth a map."""

from collections.abc import Sequence
from string import punctuation

from ..analysis.attention import Word

_STOP_WORDS = """
a an the this that these those there here it its is are was were be been being am do does did have has had can could
will would should may might must of in on at to from by for with without as into onto and or not no than then if so what
which who whom whose when why how where much many any some i you he she they we them his her their my your our me us
please s
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())


def content_words(words: Sequence[Word]) -> dict[str, list[int]]:
    """The words that are neither stop words nor punctuation nor special tokens, in lower case.

    Args:
        words: The words of a prompt.

    Returns:
        `dict[str, list[int]]`: For each word the indices of its occurrences. A word that two text encoders read, as in
            Stable Diffusion 3, occurs at least twice.
    """
    found: dict[str, list[int]] = {}
    for i, word in enumerate(words):
        text = word.text.strip(punctuation).lower()  # T5 does not separate a word from its punctuation
        if not word.special and any(map(str.isalnum, text)) and text not in STOP_WORDS:
            found.setdefault(text, []).append(i)
    return found
