"""Running a model over a benchmark: replies, resuming, sharing between processes, and failed runs."""

import json
import os
import threading

import pytest
import torch
from fixtures_evaluation import make_image, make_llava, write_captions, write_mmvp, write_naturalbench

from sdllava.evaluation import identity
from sdllava.evaluation.benchmarks import get_benchmark
from sdllava.evaluation.benchmarks.base import Sample, open_image
from sdllava.evaluation.evaluate import EvaluationOptions, LoadedModel, evaluate
from sdllava.evaluation.responder import Responder
from sdllava.evaluation.results import RunFolder, load_results, read_records
from sdllava.evaluation.runner import _batching_order, answer_samples, one_ahead


def own_reply(model, processor, sample, **generation):
    """What a user of transformers would write."""
    content = [{"type": "image"} for _ in sample.images] + [{"type": "text", "text": sample.prompt}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=[open_image(source) for source in sample.images], text=text, return_tensors="pt")
    output = model.generate(**inputs, **generation)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.usefixtures("few_tokens", "few_resamples")
@pytest.mark.parametrize(("name", "batch_size"), [("mmvp", 1), ("mmvp", 3), ("blink", 3)])
def test_replies_equal_transformers_own_generate(loaded, request, tmp_path, name, batch_size):
    folder = request.getfixturevalue(f"{name}_folder")
    options = EvaluationOptions(data=str(folder), batch_size=batch_size)
    results = evaluate(loaded, name, tmp_path / "out", options)
    benchmark = get_benchmark(name)
    records = {r["id"]: r for r in read_records(tmp_path / "out" / "samples.jsonl")}
    samples = benchmark.read(folder)
    assert records.keys() == {sample.id for sample in samples}
    replies = set()
    for sample in samples[:8]:
        expected = own_reply(
            loaded.model, loaded.processor, sample, do_sample=False, max_new_tokens=benchmark.max_new_tokens
        )
        assert records[sample.id]["reply"] == expected
        replies.add(expected)
    assert len(replies) > 2  # the random model's replies depend on its input
    assert results["samples"] == len(records)


def test_questions_on_one_image_share_its_encoding(ours):
    model, processor = ours.model, ours.processor
    images = {name: make_image(seed) for name, seed in (("a.png", 1), ("b.png", 2))}
    samples = [
        Sample(f"{name} {i}", "is it red? " + "so " * i, (image,), image_ids=(name,))
        for i in range(3)
        for name, image in images.items()
    ]
    samples.sort(key=_batching_order(samples))
    assert [sample.id for sample in samples] == [f"{name} {i}" for name in images for i in range(3)]
    encoded = []
    hook = model.model.diffusion_tower.vae.encoder.register_forward_pre_hook(lambda m, a: encoded.append(len(a[0])))
    generation = {"do_sample": False, "max_new_tokens": 4}
    questions = [[sample.prompt] for sample in samples]
    responder = Responder(model, processor)
    together = []
    for i in (0, 2, 4):
        together += responder.reply(samples[i : i + 2], generation, questions[i : i + 2])
    assert encoded == [1, 1]
    one_by_one = [
        Responder(model, processor).reply([sample], generation, [question])[0]
        for sample, question in zip(samples, questions, strict=True)
    ]
    hook.remove()
    assert together == one_by_one


def test_the_next_batch_is_prepared_while_one_is_answered():
    began, seen = [threading.Event() for _ in range(4)], []

    def prepare(item: int) -> int:
        began[item].set()
        if item == 3:
            raise ValueError("the last one is broken")
        return 10 * item

    prepared = one_ahead(prepare, range(4))
    for item in range(3):
        seen.append(next(prepared))
        assert began[item + 1].wait(timeout=5)  # while this one is used
        assert item > 1 or not began[item + 2].is_set()
    with pytest.raises(ValueError, match="broken"):
        next(prepared)
    assert seen == [0, 10, 20]
    assert list(one_ahead(str, [])) == []
    assert list(one_ahead(str, [7])) == ["7"]


@pytest.mark.usefixtures("few_resamples")
def test_results_folder(loaded, tmp_path):
    folder = write_naturalbench(tmp_path / "data")
    options = EvaluationOptions(data=str(folder), blind=True, batch_size=5)
    results = evaluate(loaded, "naturalbench", tmp_path / "out", options)
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    assert stored == json.loads(json.dumps(results))
    assert set(stored["scores"]) == {"Acc", "Q_Acc", "I_Acc", "G_Acc"} == set(stored["blind"]["scores"])
    assert stored["chance"]["G_Acc"] == 6.25
    assert stored["data"]["samples"] == 12
    assert stored["units"] == 3
    assert stored["template"]["example"].startswith("USER: <image>Is the dog red? Please answer Yes or No.")
    assert stored["dtype"] == "float32"
    assert stored["batch_size"] == 5
    assert stored["protocol"]["description"].startswith("greedy")
    assert {"transformers", "torch"} <= set(stored["versions"])
    assert stored["command"]
    for name, (low, high) in stored["intervals_95"].items():
        assert low <= stored["scores"][name] <= high
    records = read_records(tmp_path / "out" / "samples.jsonl")
    assert [r["id"] for r in records][:5] == ["0-q0i0", "0-q0i1", "0-q1i0", "0-q1i1", "1-q0i0"]
    assert set(records[0]) >= {"prompt", "reply", "parsed", "correct", "target", "group", "cell"}
    blind = read_records(tmp_path / "out" / "blind" / "samples.jsonl")
    by_question = {(r["group"], r["cell"] // 2): set() for r in blind}
    for record in blind:
        by_question[record["group"], record["cell"] // 2].add(record["reply"])
    assert all(len(replies) == 1 for replies in by_question.values())  # blind: both images look the same
    assert not list((tmp_path / "out").glob("*partial*"))
    assert len(load_results(tmp_path)) == 1


@pytest.mark.usefixtures("few_tokens", "few_resamples")
def test_a_killed_run_resumes(loaded, mmvp_folder, tmp_path, monkeypatch):
    options = EvaluationOptions(data=str(mmvp_folder), batch_size=2)
    evaluate(loaded, "mmvp", tmp_path / "whole", options)
    answered = []
    reply = Responder.reply

    def dies(self, samples, *args, **kwargs):
        answered.extend(sample.id for sample in samples)
        if len(answered) > 4:
            raise KeyboardInterrupt
        return reply(self, samples, *args, **kwargs)

    monkeypatch.setattr(Responder, "reply", dies)
    with pytest.raises(KeyboardInterrupt):
        evaluate(loaded, "mmvp", tmp_path / "cut", options)
    partial = tmp_path / "cut" / "samples.partial-0.jsonl"
    assert len(read_records(partial)) == 4
    with partial.open("ab") as file:
        file.write(b'{"id": "6", "rep')  # killed in the middle of a line
    answered.clear()
    monkeypatch.setattr(
        Responder,
        "reply",
        lambda self, samples, *a, **k: answered.extend(s.id for s in samples) or reply(self, samples, *a, **k),
    )
    evaluate(loaded, "mmvp", tmp_path / "cut", options)
    assert len(answered) == 2
    assert (tmp_path / "cut" / "samples.jsonl").read_bytes() == (tmp_path / "whole" / "samples.jsonl").read_bytes()
    whole, cut = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "cut"))
    assert whole["scores"] == cut["scores"]


@pytest.mark.usefixtures("few_tokens")
def test_processes_share_the_samples(loaded, mmvp_folder, tmp_path):
    benchmark = get_benchmark("mmvp")
    samples = benchmark.read(mmvp_folder)
    responder = Responder(loaded.model, loaded.processor)
    shares = []
    for rank in (0, 1):
        folder = RunFolder(tmp_path / "shared", {"a": 1}, rank)
        shares.append(answer_samples(responder, benchmark, samples, folder, batch_size=2, processes=2))
    assert [[record["id"] for record in share] for share in shares] == [["1", "3", "5"], ["2", "4", "6"]]
    assert [len(read_records(tmp_path / "shared" / f"samples.partial-{rank}.jsonl")) for rank in (0, 1)] == [3, 3]
    whole = answer_samples(responder, benchmark, samples, RunFolder(tmp_path / "whole", {"a": 1}), batch_size=4)
    assert sorted([*shares[0], *shares[1]], key=lambda record: record["id"]) == whole


@pytest.mark.usefixtures("few_tokens")
def test_sampling_does_not_depend_on_batch_or_resume(loaded, mmvp_folder, tmp_path):
    for name, batch_size in (("a", 1), ("b", 4)):
        options = EvaluationOptions(protocol="official", data=str(mmvp_folder), batch_size=batch_size, limit=4)
        evaluate(loaded, "mmvp", tmp_path / name, options)
    assert (tmp_path / "a" / "samples.jsonl").read_bytes() == (tmp_path / "b" / "samples.jsonl").read_bytes()
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert results["scores"] == {}
    assert "absent" in results["notes"]["judge"]
    assert "absent" in results["notes"]["score"]


# ------------------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.usefixtures("few_tokens", "few_resamples")
def test_unreadable_image_keeps_earlier_replies(loaded, tmp_path):
    folder = write_mmvp(tmp_path / "data")
    options = EvaluationOptions(data=str(folder), batch_size=1)
    (folder / "MMVP Images" / "5.jpg").write_bytes(b"broken")
    with pytest.raises(
        ValueError, match=r"the samples '5': .*'5\.jpg' cannot be read.* The first \d replies are kept in .*out"
    ):
        evaluate(loaded, "mmvp", tmp_path / "out", options)
    kept = read_records(tmp_path / "out" / "samples.partial-0.jsonl")
    assert kept
    make_image(5).save(folder / "MMVP Images" / "5.jpg")  # what the error advises
    assert evaluate(loaded, "mmvp", tmp_path / "out", options)["samples"] == 6


def test_an_error_names_the_samples_of_its_batch(loaded, mmvp_folder, tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise UnicodeDecodeError("utf-8", b"x", 0, 1, "bad")  # cannot be built from a message

    monkeypatch.setattr(Responder, "reply", fails)
    options = EvaluationOptions(data=str(mmvp_folder), batch_size=2)
    with pytest.raises(ValueError, match=r"the samples '\d', '\d': .*bad.* Changed questions need another --output\."):
        evaluate(loaded, "mmvp", tmp_path / "out", options)


@pytest.mark.usefixtures("few_tokens", "few_resamples")
def test_replies_to_other_images_are_not_kept(loaded, tmp_path):
    """Images of the same names and sizes, exchanged after the run."""
    folder = write_captions(tmp_path / "data")
    options = EvaluationOptions(data=str(folder), blind=True)
    evaluate(loaded, "captions", tmp_path / "out", options)
    file = tmp_path / "out" / "samples.jsonl"
    before, image = file.read_bytes(), (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes((folder / "2.png").read_bytes().ljust(len(image), b"\0")[: len(image)])
    with pytest.raises(ValueError, match=r"out' was written with other images of the sample '1\.png'. Choose another"):
        evaluate(loaded, "captions", tmp_path / "out", options)
    assert file.read_bytes() == before
    (folder / "1.png").write_bytes(image)
    evaluate(loaded, "captions", tmp_path / "out", options)
    assert file.read_bytes() == before
    records = [json.loads(line) for line in before.splitlines()]
    for record in records:
        del record["image_fingerprint"]  # as an earlier version wrote them
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    evaluate(loaded, "captions", tmp_path / "out", options)
    assert file.read_bytes() == before


def test_each_image_file_is_read_once(tmp_path, monkeypatch):
    make_image(0).save(tmp_path / "a.png")
    read = []
    monkeypatch.setattr(identity, "file_fingerprint", lambda path: read.append(path.name) or "hash")
    path, pixels, missing = tmp_path / "a.png", make_image(1), tmp_path / "none.png"
    sources = [(path,), (path, path), (pixels,), (lambda: pixels,), (missing,)]
    samples = [Sample(str(k), "?", images, image_ids=("x",)) for k, images in enumerate(sources)]
    found = identity.image_fingerprints(samples)
    assert sorted(read) == ["a.png", "none.png"]
    assert len({found["0"], found["1"], found["2"]}) == 3
    assert found["2"] == found["3"]


@pytest.mark.usefixtures("few_tokens", "few_resamples")
def test_other_weights_in_the_same_folder_are_another_run(mmvp_folder, tmp_path):
    """A change in the middle of a large file, which leaves its size and its end as they were, is noticed."""
    model, processor = make_llava(intermediate_size=8192)
    options = EvaluationOptions(data=str(mmvp_folder), limit=2)
    processor.save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    before = weights.read_bytes()
    results = evaluate(LoadedModel.load(str(tmp_path / "model")), "mmvp", tmp_path / "out", options)
    assert results["model"]["revision"].startswith("weights ")
    with torch.no_grad():
        model.get_input_embeddings().weight[0, 0].mul_(2)
    model.save_pretrained(tmp_path / "model")
    after = weights.read_bytes()
    assert len(after) == len(before)
    assert after[-(2**20) :] == before[-(2**20) :]
    with pytest.raises(ValueError, match=r"was written with other settings: model\.revision is 'weights .*' there"):
        evaluate(LoadedModel.load(str(tmp_path / "model")), "mmvp", tmp_path / "out", options)


@pytest.mark.usefixtures("few_tokens", "few_resamples")
def test_another_run_in_the_folder(loaded, tmp_path):
    folder = write_mmvp(tmp_path / "data")
    evaluate(loaded, "mmvp", tmp_path / "out", EvaluationOptions(data=str(folder), limit=2))
    with pytest.raises(
        ValueError, match=r"out' was written with other settings: .*data\.samples is 2 there and 4 here.*Choose another"
    ):
        evaluate(loaded, "mmvp", tmp_path / "out", EvaluationOptions(data=str(folder), limit=4))
    RunFolder(tmp_path / "empty", {"a": 1})
    (tmp_path / "empty" / ".host-1-run.json").write_text("{")  # left by a process that was killed as it began
    evaluate(loaded, "mmvp", tmp_path / "empty", EvaluationOptions(data=str(folder), limit=2))  # nothing to lose
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"contains 'thesis\.tex' and no run to resume"):
        evaluate(loaded, "mmvp", tmp_path / "mine", EvaluationOptions(data=str(folder)))


def test_half_written_folder(tmp_path):
    folder = RunFolder(tmp_path / "run", {"a": 1})
    folder.append([{"id": "1"}, {"id": "2"}])
    with folder.partial.open("a") as file:
        file.write('{"id": "3"')
    assert [record["id"] for record in folder.finished()] == ["1", "2"]
    folder.append([{"id": "3"}])
    assert [record["id"] for record in folder.finished()] == ["1", "2", "3"]
    folder.partial.write_text('{"id": "1"}\nbroken\n{"id": "2"}\n')
    with pytest.raises(ValueError, match="line 2, is damaged"):
        folder.finished()
    folder.partial.write_text('{"id": "1"}\n')
    (tmp_path / "run" / "run.json").write_text('{"a"')
    with pytest.raises(ValueError, match=r"run\.json' is damaged"):
        RunFolder(tmp_path / "run", {"a": 1})
    with pytest.raises(FileNotFoundError, match="no finished run"):
        load_results(tmp_path)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk(tmp_path):
    out = RunFolder(tmp_path / "out", {"a": 1})
    out.append([{"id": "1"}])
    out.rank = 1
    out.partial.symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device\. Make room"):
        out.append([{"id": "2"}])
    out.partial.unlink()
    assert [record["id"] for record in out.finished()] == ["1"]


def test_results_are_replaced_whole(tmp_path, monkeypatch):
    out = RunFolder(tmp_path, {"a": 1})
    out.finish([{"id": "1"}], {"scores": {"x": 1}})

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"samples\.jsonl' could not be written: No space left"):
        out.finish([{"id": "1"}], {"scores": {"x": 2}})
    assert json.loads((tmp_path / "results.json").read_text()) == {"scores": {"x": 1}}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "run.json", "samples.jsonl"]


@pytest.mark.usefixtures("few_resamples")
def test_empty_replies_and_answers_outside_the_options_are_counted(loaded, mmvp_folder, tmp_path, monkeypatch):
    replies = iter(["", "C", "(B)", "A", "the first", "B"])
    monkeypatch.setattr(Responder, "reply", lambda self, samples, *a, **k: [next(replies) for _ in samples])
    results = evaluate(loaded, "mmvp", tmp_path / "out", EvaluationOptions(data=str(mmvp_folder), batch_size=1))
    assert results["empty_replies"] == 1
    assert results["unparsed"] == 3
    assert results["notes"]["empty replies"] == "1 of 6 replies empty, counted as wrong"


def test_guidance_needs_a_diffusion_tower(loaded, mmvp_folder, tmp_path):
    with pytest.raises(ValueError, match="--guidance 4 needs a diffusion tower, which this model does not have"):
        evaluate(loaded, "mmvp", tmp_path / "out", EvaluationOptions(data=str(mmvp_folder), guidance=(4.0,)))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("few_tokens", "few_resamples")
def test_captions_with_the_plain_template(loaded, tmp_path):
    folder = write_captions(tmp_path / "data")
    results = evaluate(loaded, "captions", tmp_path / "out", EvaluationOptions(protocol="plain", data=str(folder)))
    assert results["template"] == {"name": "plain", "example": "<image>"}
    assert {"ROUGE-L", "CIDEr", "BLEU-4"} <= {name.removesuffix(" (simple tokens)") for name in results["scores"]}
    assert results["metric"] in results["scores"]
