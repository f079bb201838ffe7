"""Caption tokens: the Penn Treebank tokeniser of the published scores (Java), or a simple one without Java.

The tokeniser affects the scores, so it is part of every result, and scores on simple tokens have their own names. Also
runs SPICE, which needs Java, and reports why it is absent if it cannot run.
"""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

# pycocoevalcap removes these after tokenising; the upper-case brackets never match, since tokens are lower case
PUNCTUATION = frozenset(["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", *".?!,:-;", "--", "..."])
PTB_CLASS = "edu.stanford.nlp.process.PTBTokenizer"
INSTALL = 'Install Java, and pycocoevalcap with `pip install "sdllava[eval]"`'


def ptb_jar() -> Path | None:
    """The jar of the Stanford tokeniser in pycocoevalcap, or None if it is not installed."""
    spec = find_spec("pycocoevalcap")
    if spec is None or not spec.submodule_search_locations:
        return None
    jar = Path(spec.submodule_search_locations[0]) / "tokenizer" / "stanford-corenlp-3.4.1.jar"
    return jar if jar.is_file() else None


def ptb_missing() -> str | None:
    """The reason why PTB tokenisation cannot run, or None if it can."""
    if shutil.which("java") is None:
        return "`java` is not on the path"
    return None if ptb_jar() else "pycocoevalcap is not installed"


def ptb_tokenize(captions: Sequence[str]) -> list[str]:
    """Lower-case PTB tokens without punctuation, joined by spaces, one string per caption.

    Raises:
        RuntimeError: Java or the jar is missing, or the tokeniser fails.
    """
    if reason := ptb_missing():
        raise RuntimeError(f"PTB tokenisation cannot run because {reason}. {INSTALL}.")
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8", newline="\n") as file:
        file.write("\n".join(" ".join(caption.splitlines()) for caption in captions))
        file.flush()
        command = ["java", "-cp", str(ptb_jar()), PTB_CLASS, "-preserveLines", "-lowerCase", file.name]
        run = subprocess.run(command, capture_output=True, encoding="utf-8")
    lines = run.stdout.split("\n")
    if run.returncode or len(lines) < len(captions):
        last = run.stderr.strip().splitlines()[-1:] or ["no output"]
        raise RuntimeError(f"The PTB tokeniser failed: {last[0]}. Check `java -version`.")
    return [
        " ".join(token for token in line.rstrip().split(" ") if token not in PUNCTUATION)
        for line, _ in zip(lines, captions, strict=False)
    ]


def simple_tokenize(captions: Sequence[str]) -> list[str]:
    """Lower-case words without punctuation: close to PTB tokens, but not comparable with published scores."""
    return [" ".join(re.findall(r"[\w]+(?:['-][\w]+)*", caption.lower())) for caption in captions]


def tokenize(captions: Sequence[str], tokenizer: str | None = None) -> tuple[list[str], str]:
    """Tokenise captions.

    Args:
        captions: Any text.
        tokenizer: "ptb" or "simple". None uses PTB if it can run.

    Returns:
        `tuple[list[str], str]`: Tokenised captions, and the name of the tokeniser.

    Raises:
        ValueError: The tokeniser is unknown.
    """
    name = tokenizer or ("simple" if ptb_missing() else "ptb")
    if name not in ("ptb", "simple"):
        raise ValueError(f"Unknown caption tokeniser {name!r}. Choose ptb or simple.")
    return (ptb_tokenize if name == "ptb" else simple_tokenize)(captions), name


def spice_missing() -> str | None:
    """The reason why SPICE cannot run, or None if it can."""
    if reason := ptb_missing():
        return reason
    jar = ptb_jar()
    if jar is None or not (jar.parents[1] / "spice" / "lib" / "stanford-corenlp-3.6.0.jar").is_file():
        return (
            "Stanford CoreNLP 3.6 is not in pycocoevalcap's folder; fetch it once with "
            '`python -c "from pycocoevalcap.spice.get_stanford_models import get_stanford_models as g; g()"`'
        )
    return None


def spice(
    candidates: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> tuple[dict[str, float], str | None]:
    """SPICE through pycocoevalcap's jar, which needs Java 8 to 13.

    Args:
        candidates: Image id -> caption.
        references: Image id -> reference captions.

    Returns:
        `tuple[dict[str, float], str | None]`: F scores in [0, 1] by image id and None, or no scores and the reason.
    """
    if reason := spice_missing():
        return {}, reason
    from pycocoevalcap.spice.spice import Spice

    images = sorted(candidates)
    try:
        _, scores = Spice().compute_score(
            {image: list(references[image]) for image in images}, {image: [candidates[image]] for image in images}
        )
    except subprocess.CalledProcessError as error:
        return {}, f"its Java program failed with exit status {error.returncode} (it needs Java 8 to 13)"
    return {image: score["All"]["f"] for image, score in zip(images, scores, strict=True)}, None
