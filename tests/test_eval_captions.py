"""Caption metrics against pycocoevalcap and against its published numbers on 80 COCO images."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sdllava.evaluation.caption_metrics import caption_scores, cider_d, rouge_l
from sdllava.evaluation.tokenization import PUNCTUATION, ptb_missing, ptb_tokenize, simple_tokenize, spice, tokenize

COCO = Path(__file__).parents[2] / "shared" / "data" / "coco" / "caps_boxes_coco2014_val_80.jsonl"
needs_java = pytest.mark.skipif(ptb_missing() is not None, reason=f"no PTB tokeniser: {ptb_missing()}")


@pytest.fixture(scope="module")
def coco():
    """(hypotheses, references): image id -> PTB tokens, first caption against the next four."""
    if not COCO.is_file():
        pytest.skip("the COCO captions are not here")
    rows = [json.loads(line) for line in COCO.read_text().splitlines()]
    tokens = iter(ptb_tokenize([caption for row in rows for caption in row["captions"][:5]]))
    captions = {row["id"]: [next(tokens) for _ in row["captions"][:5]] for row in rows}
    return {k: v[0] for k, v in captions.items()}, {k: v[1:] for k, v in captions.items()}


@needs_java
def test_published_numbers(coco):
    scores = caption_scores(*coco)
    assert scores["BLEU-4"] / 100 == pytest.approx(0.1655197603, abs=1e-9)
    assert scores["ROUGE-L"] / 100 == pytest.approx(0.4414738423, abs=1e-9)
    assert scores["CIDEr"] / 100 == pytest.approx(0.9547818957, abs=1e-9)


def reference_scores(hypotheses, references):
    pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is not installed")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    candidates = {image: [caption] for image, caption in hypotheses.items()}
    bleu, _ = Bleu(4).compute_score(references, candidates, verbose=0)
    expected = {f"BLEU-{n}": value for n, value in enumerate(bleu, 1)}
    expected["ROUGE-L"] = Rouge().compute_score(references, candidates)[0]
    expected["CIDEr"] = Cider().compute_score(references, candidates)[0]
    return expected


@needs_java
def test_equal_to_pycocoevalcap_on_coco(coco):
    ours = caption_scores(*coco)
    for name, value in reference_scores(*coco).items():
        assert ours[name] / 100 == pytest.approx(value, abs=1e-9), name


@pytest.mark.parametrize("seed", range(5))
def test_equal_to_pycocoevalcap_on_random_captions(seed):
    """Repeated words, empty captions, candidates longer and shorter than references, unequal reference counts."""
    generator = random.Random(seed)

    def words(low, high):
        return " ".join(generator.choices(["a", "b", "c", "d", "e", "f", "g\xa0h"], k=generator.randint(low, high)))

    hypotheses = {str(i): words(0, 12) for i in range(12)}
    references = {str(i): [words(1, 12) for _ in range(generator.randint(1, 4))] for i in range(12)}
    ours = caption_scores(hypotheses, references)
    for name, value in reference_scores(hypotheses, references).items():
        assert ours[name] / 100 == pytest.approx(value, abs=1e-9), name


def test_known_values():
    assert rouge_l("a b c", ["a b c"]) == 1
    assert rouge_l("a b", ["c d"]) == 0
    assert cider_d(["a b"], [["a b"]]) == [0.0]  # with one image every idf is zero
    perfect = caption_scores({"1": "a b c d", "2": "e f g h"}, {"1": ["a b c d"], "2": ["e f g h"]})
    assert perfect["BLEU-4"] == pytest.approx(100)
    assert perfect["CIDEr"] == pytest.approx(1000)


def test_captions_must_fit():
    with pytest.raises(ValueError, match="'2'"):
        caption_scores({"1": "a", "2": "b"}, {"1": ["a"]})
    with pytest.raises(ValueError, match="'1' has no reference"):
        caption_scores({"1": "a"}, {"1": []})


@needs_java
def test_ptb_tokens_equal_pycocoevalcaps():
    pytest.importorskip("pycocoevalcap")
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    captions = ['A man\'s dog (brown), "sitting".', "22 3/4 inches...", "don't; it's 3:30 -- now!", "", "ü–é"]
    captions = [caption for caption in captions if caption]
    theirs = PTBTokenizer().tokenize({i: [{"caption": caption}] for i, caption in enumerate(captions)})
    lines = ["a\nb", "c", "d\r\ne", ""]
    ours = ptb_tokenize([*captions, *lines])
    assert ours == [*(theirs[i][0] for i in range(len(captions))), "a b", "c", "d e", ""]  # one line per caption
    assert "-lrb-" in ours[0]
    assert not PUNCTUATION & set(" ".join(ours).split())


def test_without_java_nothing_is_called_by_the_published_name(monkeypatch):
    from sdllava.evaluation.benchmarks.captions import CocoCaptions

    monkeypatch.setattr("shutil.which", lambda name: None)
    assert tokenize(["A dog, here."]) == (["a dog here"], "simple")
    with pytest.raises(RuntimeError, match="`java` is not on the path"):
        ptb_tokenize(["a"])
    assert spice({"1": "a"}, {"1": ["a"]}) == ({}, "`java` is not on the path")
    benchmark = CocoCaptions()
    records = [
        {"id": str(i), "reply": text, "target": [text, "a cat"], "correct": None}
        for i, text in enumerate(["a dog runs", "two birds sit"])
    ]
    scores = benchmark.score(records)
    assert benchmark.metric in scores
    assert all(name.endswith("(simple tokens)") for name in scores)
    assert "absent" in benchmark.notes["SPICE"]
    assert "absent" in benchmark.notes["PTB tokens"]


def test_simple_tokens():
    assert simple_tokenize(["A man's well-known Dog, (brown)!"]) == ["a man's well-known dog brown"]
    with pytest.raises(ValueError, match="Unknown caption tokeniser 'penn'"):
        tokenize(["a"], "penn")


STAND_IN = """
import java.nio.file.*;
import java.util.regex.*;

public class Spice {
    public static void main(String[] given) throws Exception {
        String input = new String(Files.readAllBytes(Paths.get(given[0])), "UTF-8"), output = null;
        for (int i = 0; i < given.length; i++) if (given[i].equals("-out")) output = given[i + 1];
        StringBuilder scores = new StringBuilder();
        Matcher item = Pattern.compile("\\"image_id\\": \\"(.*?)\\",\\\\s*\\"test\\": \\"(.*?)\\"").matcher(input);
        while (item.find()) {
            double f = 1.0 / item.group(2).split(" ").length;
            scores.append(scores.length() == 0 ? "[" : ",");
            scores.append("{\\"image_id\\": \\"" + item.group(1) + "\\", ");
            scores.append("\\"scores\\": {\\"All\\": {\\"f\\": " + f + "}}}");
        }
        Files.write(Paths.get(output), (scores + "]").getBytes("UTF-8"));
    }
}
"""
"""In place of SPICE: the F score of a caption is 1 divided by its number of words."""


@pytest.fixture
def spice_stand_in(tmp_path, monkeypatch):
    """pycocoevalcap with a small Java program as `spice-1.0.jar` and an empty CoreNLP."""
    package = pytest.importorskip("pycocoevalcap")
    if not shutil.which("javac") or not shutil.which("jar"):
        pytest.skip("needs a Java compiler, javac and jar")
    source = Path(package.__path__[0])
    shutil.copytree(source, tmp_path / "pycocoevalcap", ignore=shutil.ignore_patterns("*.jar", "*.gz", "meteor"))
    folder = tmp_path / "pycocoevalcap" / "spice"
    (folder / "lib").mkdir(exist_ok=True)
    for name in ("", "-models"):
        (folder / "lib" / f"stanford-corenlp-3.6.0{name}.jar").touch()
    tokenizer = "tokenizer/stanford-corenlp-3.4.1.jar"
    shutil.copy(source / tokenizer, tmp_path / "pycocoevalcap" / tokenizer)
    (tmp_path / "Spice.java").write_text(STAND_IN)
    subprocess.run(["javac", "Spice.java"], cwd=tmp_path, check=True)
    subprocess.run(["jar", "cfe", str(folder / "spice-1.0.jar"), "Spice", "Spice.class"], cwd=tmp_path, check=True)
    for name in [name for name in sys.modules if name.split(".")[0] == "pycocoevalcap"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    return folder


@pytest.mark.slow
@needs_java
@pytest.mark.usefixtures("few_resamples")
def test_spice_runs_a_java_program_and_its_scores_are_in_the_results(spice_stand_in):
    """A stand-in, because CoreNLP is downloaded: this covers the call and its results, not SPICE itself."""
    from sdllava.evaluation.benchmarks.captions import CocoCaptions
    from sdllava.evaluation.runner import summarise

    references = {"1": ["a b", "c"], "2": ["d"]}
    assert spice({"1": "a red dog", "2": "birds"}, references) == ({"1": pytest.approx(1 / 3), "2": 1.0}, None)
    records = [
        {"id": image, "reply": text, "parsed": text, "target": references[image], "correct": None}
        for image, text in (("1", "A red dog."), ("2", "Birds."))
    ]
    benchmark = CocoCaptions()
    results = summarise(benchmark, records)
    assert results["scores"]["SPICE"] == pytest.approx(100 * (1 / 3 + 1) / 2)
    assert "SPICE" not in benchmark.notes
    (spice_stand_in / "spice-1.0.jar").write_bytes(b"damaged")
    scores, reason = spice({"1": "a"}, {"1": ["a"]})
    assert scores == {}
    assert reason.startswith("its Java program failed with exit status 1")
