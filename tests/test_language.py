"""The language of the repository: words to avoid, machine paths, relative links, and versions in files for tools.

CONTRIBUTING.md describes the language. A hit names the file, the line, and the words to use instead.
"""

import re
import subprocess
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WRITTEN = (".py", ".md", ".yaml", ".yml", ".toml", ".cff", ".jinja")
"""Suffixes of the files that we write; data files are not checked."""


class Rule(NamedTuple):
    """Words to avoid.

    Args:
        name: The name in `EXEMPT`.
        pattern: A regular expression over small letters. A space also matches line breaks and underscores. Matches
            with a group named `fine` are allowed.
        instead: The words to use.
    """

    name: str
    pattern: str
    instead: str


TOWERS = "clip|sd|sdxl|diffusion|vae|unet|tower|encoder|model|projector|question|prompt|text|caption|image|noise"
AMOUNTS = "images?|samples?|tokens?|requests?|questions?|seconds?|pixels|rows?|maps?|bytes|mb|gb|mib|gib|gflop|ms|s"
RATES = (
    "second|minute|hour|image|answer|question|prompt|token|step|sample|gpu|process|line|round|batch|call|multiply-add"
)

ERRORS = "raises `ValueError`; returns HTTP 400 with a message"
RULES = [
    # `static_norm` is a key of saved checkpoints, `html_static_path` an option of Sphinx
    Rule(
        "static", r"\bstatic (encoders?|features?|towers?|tokens?|maps?|(?!norm|path)\w+ ?=)|\bhas static\b", "vision"
    ),
    Rule(
        "asked",
        r"\basked\b",
        "the prompt is the question; conditioned on; on request",
    ),
    Rule("unasked", r"\bunasked\b", "unconditional"),
    Rule("told", r"\btold\b", f"given, prompted, reported, distinguished; {ERRORS}"),
    Rule("heeds", r"\bheed(s|ed|ing)?\b", "follows"),
    Rule("sentence", r"\b(in|with|gets?) a sentence\b|\bone sentence\b", ERRORS),
    Rule("refused", r"(?P<fine>\) )?\b(is|are|was|were) refused\b", ERRORS),
    Rule("answered with", r"\b(is|are) answered with\b", "returns, raises"),
    Rule("goes on", r"\b(go|goes|going|went) on\b(?P<fine> top)?", "resumes, continues"),
    Rule("known image", r"\b(an? |the )known (images?|latents)\b|\b(image|latents) known\b", "cached image features"),
    Rule("beside", r"\bbesides?\b", "next to, with, compared with, in addition to"),
    Rule("aside", r"\baside\b", "temporary, separately, next to"),
    Rule("behind", r"\bbehind\b", "after, with, following"),
    Rule("is no", r"(?P<fine>\bthere )?\b(is|are|was|were) no\b(?!-)(?! longer\b)", "is not a; there is no"),
    Rule("alone", r"(?<!stand-)\balone\b[`\"'*]*(?= ?[.,;:)|])|\b(TOWERS|those|them|it)('s)? alone\b", "only"),
    Rule("anew", r"\banew\b", "again, from scratch"),
    Rule("from nothing", r"\bfrom nothing\b", "from scratch"),
    Rule("looks at", r"\blook(s|ed|ing)? at\b", "reads, uses, computes, inspects"),
    Rule("is shown", r"\b(is|are|was|were) shown\b", "reads, gets, is displayed"),
    Rule("untried", r"\buntried\b", "untested"),
    Rule("never seen", r"\bnever[- ]seen\b", "held-out, unseen"),
    Rule("rate", r"\b(AMOUNTS) an? (RATES)\b", "per: images per second, one row per image"),
]

EXEMPT: dict[str, set[str]] = {
    "tests/test_language.py": {rule.name for rule in RULES},
}
"""Names of rules by file, for data that needs the words."""


def compiled(rule: Rule) -> re.Pattern[str]:
    pattern = rule.pattern.replace("TOWERS", TOWERS).replace("AMOUNTS", AMOUNTS).replace("RATES", RATES)
    return re.compile(re.sub(r" (?!\?)", r"\\s+", pattern).replace(" ?", r"\s*"))


PATTERNS = {rule: compiled(rule) for rule in RULES}


def tracked(*suffixes: str) -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode != 0:
        pytest.skip("the files that git tracks are only known in a git repository")
    paths = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    return [path for path in paths if path.is_file() and (not suffixes or path.name.endswith(suffixes))]


def words(text: str) -> str:
    """The text in small letters and as one line of the same length; identifiers become words."""
    return re.sub(r"\n[ \t]*(#+[ \t]*)?", lambda m: " " * len(m.group()), text).replace("_", " ").lower()


def hits(text: str, exempt: frozenset[str] | set[str] = frozenset()) -> list[tuple[int, str, str]]:
    """Line, words and replacement of every hit of a rule in a text."""
    found, searched = [], words(text)
    for rule, pattern in PATTERNS.items():
        if rule.name in exempt:
            continue
        for match in pattern.finditer(searched):
            if not match.groupdict().get("fine"):
                line = text.count("\n", 0, match.start()) + 1
                found.append((line, " ".join(match.group().split()), rule.instead))
    return sorted(found)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It knows CLIP alone.", ["clip alone"]),
        ("def test_a_user_is_told(): ...", ["told"]),
        ("the UNet is\n    # asked the question", ["asked"]),
        ("self.static_encoder = 1", ["static encoder"]),
        ("that is no file", ["is no"]),
        ("There is no file; it is no longer there", []),
        ("97 images a second, one row an image", ["images a second", "row an image"]),
        ("@staticmethod\ndef stand_alone(): ...", []),
        ("a stand-alone script", []),
    ],
)
def test_rules_find_words_in_prose_and_identifiers(text, expected):
    assert [found for _, found, _ in hits(text)] == expected


def test_files_use_plain_technical_english():
    problems = []
    for path in [*tracked(*WRITTEN), ROOT / "Makefile"]:
        name = path.relative_to(ROOT).as_posix()
        for line, found, instead in hits(path.read_text(encoding="utf-8"), EXEMPT.get(name, frozenset())):
            problems.append(f"{name}:{line}: {found!r}; write: {instead}")
    assert not problems, f"{len(problems)} places:\n" + "\n".join(problems)


def test_exemptions_name_files_that_need_them():
    for name, exempt in EXEMPT.items():
        if ROOT / name == Path(__file__):
            continue
        text = words((ROOT / name).read_text(encoding="utf-8"))
        unused = [rule.name for rule in RULES if rule.name in exempt and not PATTERNS[rule].search(text)]
        assert not unused, f"{name} does not need the exemptions {unused}"


PLACES = {"build", "data", "dist", "home", "proc", "resolve", "tmp", "usr"} | {path.name for path in ROOT.iterdir()}
"""Where absolute paths may begin: in containers, in the system, in addresses, and in the repository."""


def test_no_file_mentions_paths_of_one_machine():
    pattern = re.compile(r"(?<![\w./})-])/(?P<place>[a-z]+)/|/opt/|\.\./shared\b")
    problems = []
    for path in tracked():
        name = path.relative_to(ROOT).as_posix()
        if name.startswith("tests/") or path.suffix in (".png", ".safetensors"):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            found = [match.group() for match in pattern.finditer(line) if match["place"] not in PLACES]
            problems += [f"{name}:{number}: {place}" for place in found]
    assert not problems, "\n".join(problems)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ +(.+?) *$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_relative_links_resolve():
    problems = []
    for page in tracked(".md"):
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)|<img[^>]* src=\"([^\"]+)\"", text):
            place, _, anchor = "".join(target).partition("#")
            if re.match(r"[a-z]+:", place):
                continue
            linked = page.parent / place if place else page
            name = f"{page.relative_to(ROOT).as_posix()}: {''.join(target)}"
            if not linked.exists():
                problems.append(f"{name}: there is no such file")
            elif anchor and linked.suffix == ".md" and anchor not in anchors(linked):
                problems.append(f"{name}: there is no such heading")
    assert not problems, "\n".join(problems)


def test_tools_and_workflows_use_the_versions_of_the_project():
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert {hook["repo"].rsplit("/", 1)[-1]: hook["rev"] for hook in hooks}["ruff-pre-commit"] == f"v{pins['ruff']}"
    matrix = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())["jobs"]["test"]["strategy"]["matrix"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["requires-python"] == f">={matrix['python'][0]}"
    assert all((ROOT / name).is_file() for name in matrix["constraints"])
    oldest = (ROOT / "constraints-oldest.txt").read_text()
    for package in ("torch", "transformers", "diffusers"):
        (requirement,) = (x for x in project["project"]["dependencies"] if re.match(rf"{package}\b", x))
        lowest = re.search(r">=([\d.]+)", requirement).group(1)
        assert re.search(rf"^{package}=={re.escape(lowest)}(\.0)*$", oldest, flags=re.MULTILINE), requirement
        assert pins[package]


def test_the_citation_has_the_packages_version():
    from sdllava.version import __version__

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (__version__, "Apache-2.0")


@pytest.mark.parametrize("name", ["bug", "feature", "question"])
def test_issue_forms_are_complete(name):
    form = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{name}.yml").read_text())
    assert set(form) == {"name", "description", "labels", "body"}
    assert len({field["id"] for field in form["body"]}) == len(form["body"])
    assert all(field["attributes"]["label"] for field in form["body"])
