"""Caption tokens: the Penn Treebank tokeniser that the published scores use (Java), and a plain one where it is absent.

Which of the two was used is part of every result, because it moves the scores; scores on plain tokens carry another
name. SPICE (Java as well) is here too; where it cannot run it is reported absent.
"""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

# what pycocoevalcap removes after tokenising; the upper-case brackets never match, since tokens are lower case
PUNCTUATION = frozenset(["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", *".?!,:-;", "--", "..."])
PTB_CLASS = "edu.stanford.nlp.process.PTBTokenizer"
INSTALL = 'install Java and `pip install "sdllava[eval]"` (pycocoevalcap)'


def ptb_jar() -> Path | None:
    """Pycocoevalcap's jar of the Stanford tokeniser, where it is installed."""
    from importlib.util import find_spec

    spec = find_spec("pycocoevalcap")
    if spec is None or not spec.submodule_search_locations:
        return None
    jar = Path(spec.submodule_search_locations[0]) / "tokenizer" / "stanford-corenlp-3.4.1.jar"
    return jar if jar.is_file() else None


def ptb_missing() -> str | None:
    """Why PTB tokenisation cannot run here, or None where it can."""
    if shutil.which("java") is None:
        return "there is no `java` on the path"
    return None if ptb_jar() else "pycocoevalcap is not installed"


def ptb_tokenize(captions: Sequence[str]) -> list[str]:
    """Lower-case PTB tokens without punctuation, joined by spaces, one string per caption.

    Raises:
        RuntimeError: Java or the jar is missing, or the tokeniser failed.
    """
    if reason := ptb_missing():
        raise RuntimeError(f"PTB tokenisation is not possible because {reason}; {INSTALL}.")
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8", newline="\n") as file:
        file.write("\n".join(" ".join(caption.splitlines()) for caption in captions))
        file.flush()
        command = ["java", "-cp", str(ptb_jar()), PTB_CLASS, "-preserveLines", "-lowerCase", file.name]
        run = subprocess.run(command, capture_output=True, encoding="utf-8")
    lines = run.stdout.split("\n")
    if run.returncode or len(lines) < len(captions):
        last = run.stderr.strip().splitlines()[-1:] or ["no output"]
        raise RuntimeError(f"The PTB tokeniser failed: {last[0]}.")
    return [
        " ".join(token for token in line.rstrip().split(" ") if token not in PUNCTUATION)
        for line, _ in zip(lines, captions, strict=False)
    ]


def simple_tokenize(captions: Sequence[str]) -> list[str]:
    """Lower-case words, with punctuation taken off: close to PTB tokens, but not comparable with published scores."""
    return [" ".join(re.findall(r"[\w]+(?:['-][\w]+)*", caption.lower())) for caption in captions]


def tokenize(captions: Sequence[str], tokenizer: str | None = None) -> tuple[list[str], str]:
    """Tokenised captions and the name of the tokeniser ("ptb" or "simple"); None takes PTB where it can run."""
    name = tokenizer or ("simple" if ptb_missing() else "ptb")
    if name not in ("ptb", "simple"):
        raise ValueError(f"The caption tokeniser is ptb or simple, not {name!r}.")
    return (ptb_tokenize if name == "ptb" else simple_tokenize)(captions), name


def spice_missing() -> str | None:
    """Why SPICE cannot run here, or None where it can."""
    if reason := ptb_missing():
        return reason
    if not (ptb_jar().parents[1] / "spice" / "lib" / "stanford-corenlp-3.6.0.jar").is_file():
        return (
            "Stanford CoreNLP 3.6 is not in pycocoevalcap's folder; fetch it once with "
            '`python -c "from pycocoevalcap.spice.get_stanford_models import get_stanford_models as g; g()"`'
        )
    return None


def spice(
    candidates: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> tuple[dict[str, float], str | None]:
    """SPICE F score in [0, 1] by image id through pycocoevalcap's jar (Java 8 to 13), or ({}, why it is absent)."""
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
