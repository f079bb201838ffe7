"""The `evaluate` modules and the lmms-eval adapter."""

from types import SimpleNamespace

import pytest
from fixtures_evaluation import make_image

from sdllava.evaluation.metrics import METRICS, metric_path


@pytest.fixture
def load(tmp_path, monkeypatch):
    evaluate = pytest.importorskip("evaluate", reason="evaluate is not installed")
    monkeypatch.setenv("HF_EVALUATE_OFFLINE", "1")
    return lambda name: evaluate.load(str(metric_path(name)), cache_dir=str(tmp_path))


def test_mmvp(load):
    found = load("mmvp").compute(predictions=["A", "B", "A", "A"], references=["A", "B", "A", "B"])
    assert found == {"pair_accuracy": 50.0, "single_accuracy": 75.0}


def test_naturalbench(load):
    metric = load("naturalbench")
    found = metric.compute(predictions=[1, 0, 0, 1, 1, 1, 1, 1], references=[1, 0, 0, 1] * 2)
    assert found == {"G_Acc": 50.0, "Q_Acc": 50.0, "I_Acc": 50.0, "Acc": 75.0}
    with pytest.raises(ValueError, match=r"there are 3 predictions\. Give a multiple of four"):
        metric.compute(predictions=[1, 0, 0], references=[1, 0, 0])


def test_winoground(load):
    matrices = [[[2.0, 1.0], [1.0, 2.0]], [[2.0, 1.0], [3.0, 4.0]]]
    assert load("winoground").compute(predictions=matrices) == {"text": 50.0, "image": 100.0, "group": 50.0}


def test_captions(load):
    found = load("captions").compute(
        predictions=["A red dog runs fast.", "Two birds sit on it."],
        references=[["a red dog runs fast", "a dog"], ["two birds sit on it"]],
        tokenizer="simple",
    )
    assert found["tokenizer"] == "simple"
    assert found["BLEU-4 (simple tokens)"] == pytest.approx(100)


def test_every_metric_has_its_folder():
    assert all((metric_path(name) / f"{name}.py").is_file() for name in METRICS)
    with pytest.raises(ValueError, match="Unknown metric 'bleu'"):
        metric_path("bleu")


def test_lmms_eval_adapter(composed):
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed")
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    from sdllava.evaluation.lmms_eval_model import MANIFEST

    registry = ModelRegistryV2()
    registry.register_manifest(MANIFEST)
    model = registry.get_model_class("sdllava")(pretrained=str(composed), batch_size=2, guidance=1)
    documents = [{"text": "Is it red?", "image": make_image(k)} for k in range(3)]
    model.task_dict = {"t": {"test": documents}}

    def messages(doc):
        content = [{"type": "image", "url": doc["image"]}, {"type": "text", "text": doc["text"]}]
        return [{"role": "user", "content": content}]

    options = {"max_new_tokens": 4, "temperature": 0, "until": ["\n"]}
    requests = [SimpleNamespace(args=("", messages, options, k, "t", "test")) for k in range(3)]
    replies = model.generate_until(requests)
    assert len(replies) == 3
    assert all(isinstance(reply, str) for reply in replies)
    with pytest.raises(ValueError, match="Unknown --model_args 'typo'"):
        type(model)(pretrained=str(composed), typo=1)
