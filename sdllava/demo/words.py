"""The words of a question that are worth a map."""

from collections.abc import Sequence

from ..analysis.attention import Word

_STOP_WORDS = """
a an the this that these those there here it its is are was were be been being am do does did have has had can could
will would should may might must of in on at to from by for with without as into onto and or not no than then if so what
which who whom whose when why how where much many any some i you he she they we them his her their my your our me us
please s
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())


def content_words(words: Sequence[Word]) -> list[int]:
    """The indices of words that are neither stop words nor punctuation nor special tokens.

    Args:
        words: The words of a prompt. If a word occurs several times, all of its occurrences are given.
    """
    return [
        i
        for i, word in enumerate(words)
        if not word.special and any(map(str.isalnum, word.text)) and word.text.lower() not in STOP_WORDS
    ]
