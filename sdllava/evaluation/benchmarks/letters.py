"""The option that a free reply to a question with lettered options names."""

import re
from collections.abc import Sequence

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
NEGATION = re.compile(r"\b(?:not|no|never|neither|cannot|wrong|incorrect)\b|n['\u2019]t\b")
"""Words, in small letters, with which a reply may exclude the option that it contains."""
DENIAL = r"(?i:not|never|isn['\u2019]t|cannot|wrong|incorrect)"
"""Before a letter: the reply excludes it."""
DENIED = (
    r"(?i:(?:(?:is|was)\s+)?(?:\w+\s+)?(?:wrong|incorrect)|(?:is|was)\s+(?:not|never)|"
    r"isn['\u2019]t|can(?:not|['\u2019]t))\b"
)
"""After a letter: the reply excludes it."""
ARTICLE = r"[AI]\s+(?!(?:is|because|since|as)\b)\w"
"""The start of "A cat", where "A" is not a letter of an option."""


def normalise(text: str) -> str:
    """Lower case, single spaces, and without punctuation at the end."""
    return " ".join(text.lower().split()).rstrip(".!,;: ")


def contains(reply: str, text: str) -> bool:
    """Whether a normalised reply contains a normalised text as whole words. The number 3 is not in 3.5."""
    return bool(text) and re.search(_words(text), reply) is not None


def parse_letter(reply: str, options: Sequence[str]) -> str | None:
    """The letter of the option that a reply names, or None.

    The forms, in this order; bold type, italics and code marks do not count:

    1. only a letter: "B", "b.", "(b)";
    2. the text of an option: "green";
    3. a letter with the text of its option: "B green";
    4. a letter at the beginning: "(B) ...", "B. ...", "B, ...", or one with a line break after it;
    5. "the answer is B", "Answer: B", or else "option B", or else "(B)" anywhere, if the reply has one such letter;
    6. one option's text as whole words, in a reply without a negation.

    Letters that the reply excludes ("(A) is wrong", "not A") do not count in 4 and 5. In 5, a small letter counts in
    parentheses, before punctuation or at the end, since it may be an article.

    Args:
        reply: The model's reply.
        options: The texts of the options, in the order of their letters.
    """
    reply = _plain(reply)
    texts = [normalise(_plain(option)) for option in options]
    return _whole(reply, texts) or _named(reply, LETTERS[: len(options)]) or _contained(normalise(reply), texts)


def _plain(text: str) -> str:
    """Text without Markdown's marks of bold type, italics and code."""
    return re.sub(r"\*|`|__", "", text).strip()


def _whole(reply: str, texts: Sequence[str]) -> str | None:
    """The letter of a reply that is only a letter, an option's text, or both."""
    letters = LETTERS[: len(texts)]
    if found := re.fullmatch(rf"(?i)\(([{letters}])\)[.:,!]?|([{letters}])[.:,)!]?", reply):
        return (found[1] or found[2]).upper()
    text = normalise(reply)
    if text and text in texts:
        return letters[texts.index(text)]
    if found := re.fullmatch(rf"(?is)\(?([{letters}])\b[\s.:,;)-]*(.+)", reply):
        letter = found[1].upper()
        if normalise(found[2]) == texts[letters.index(letter)]:
            return letter
    return None


def _named(reply: str, letters: str) -> str | None:
    """The letter that a longer reply names and does not exclude."""
    small = letters.lower()
    letter = rf"(?:\([{letters}{small}]\)|[{letters}](?![\w'\u2019])|[{small}](?=[.,:;!?]|\s*$))"
    excluded = rf"\b{DENIAL}\s+(?:(?i:the|option|answer|choice|is|be)\s+)*{letter}|(?<!\w){letter}\s*{DENIED}"
    reply = re.sub(excluded, " ", reply).strip(" ,;.\n")
    listed = rf",(?!\s*(?i:and\s+|or\s+)?{letter}(?:\W*$|\s*,|\s+and\b|\s+or\b))"  # not "A, B and C"
    begin = rf"\(([{letters}{small}])\)|([{letters}])(?=[.:)]|{listed}|\s*$|\s*\n)|([{small}])(?=[.:)](?:\s|$)|\s*\n)"
    if found := re.match(begin, reply):
        return next(filter(None, found.groups())).upper()
    for pattern in (
        rf"(?i:\b(?:answer|option|choice)(?:\s+is\s*:?|\s*:)\s*(?:option\s+)?)(?!{ARTICLE})({letter})",
        rf"(?i:\b(?:answer|option|choice)\s+)({letter})",
        rf"(?<!\w)(\([{letters}{small}]\))",
    ):
        named = {match.strip("()").upper() for match in re.findall(pattern, reply)}
        if named:
            return named.pop() if len(named) == 1 else None
    return None


def _contained(reply: str, texts: Sequence[str]) -> str | None:
    """The letter of the only option whose text is in the reply, if the reply has no negation."""
    found, rest = [], reply
    for text in sorted(set(texts), key=len, reverse=True):  # "dark red" is not also "red"
        searchable = len(text) > 1 or text.isdigit()  # "a" may be an article
        if searchable and contains(rest, text):
            found.append(text)
            rest = re.sub(_words(text), " ", rest)
    if len(found) != 1 or (NEGATION.search(reply) and not NEGATION.search(found[0])):
        return None
    return LETTERS[texts.index(found[0])]


def _words(text: str) -> str:
    return rf"(?<!\w)(?<!\d[.,]){re.escape(text)}(?!\w|[.,]\d)"
