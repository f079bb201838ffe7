"""Caption metrics against pycocoevalcap and against its published numbers on 80 COCO images."""

import json
import random
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
