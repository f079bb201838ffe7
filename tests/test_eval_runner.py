"""Running a model over a benchmark: replies, resuming, sharing between processes, judges, and failed runs."""

import json
import os
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from fixtures_evaluation import make_image, make_llava, write_captions, write_mmvp, write_naturalbench
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sdllava.evaluation.benchmarks import get_benchmark
from sdllava.evaluation.benchmarks.base import Sample, open_image
from sdllava.evaluation.evaluate import EvaluationOptions, LoadedModel, evaluate
from sdllava.evaluation.judge import EndpointJudge, JudgeRejectionError, make_judge
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


# --------------------------------------------------------------------------------------------------------- judge


@pytest.fixture
def endpoint():
    """A local OpenAI-compatible server that replies with `answer` and records the requests.

    `failures` are the statuses of the next requests, `rejects` the parameters that give HTTP 400.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.requests.append((self.path, self.headers.get("Authorization"), body))
            rejected = [name for name in server.rejects if name in body]
            status, error = (server.failures.pop() if server.failures else 200), {}
            if rejected:
                status, error = 400, {"message": f"Unsupported parameter: '{rejected[0]}' is not supported."}
            reply = json.dumps({"choices": [{"message": {"content": server.answer}}]}).encode()
            self.send_response(status)
            self.end_headers()
            self.wfile.write(reply if status == 200 else json.dumps({"error": error}).encode())

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.failures, server.answer, server.rejects = [], [], "yes", ()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def judge_at(server):
    return EndpointJudge("gpt-4-0314", f"http://127.0.0.1:{server.server_port}/v1", key="secret", wait=0.0)


@pytest.mark.usefixtures("few_tokens", "few_resamples")
def test_endpoint_judge(loaded, mmvp_folder, tmp_path, endpoint):
    options = EvaluationOptions(protocol="official", data=str(mmvp_folder), limit=4)
    endpoint.failures = [500]  # the first request is repeated
    results = evaluate(loaded, "mmvp", tmp_path / "out", options, judge=judge_at(endpoint))
    assert results["scores"] == {"pair_accuracy": 100.0, "single_accuracy": 100.0}
    assert results["judge"].startswith("gpt-4-0314 at http://127.0.0.1")
    path, key, body = endpoint.requests[0]
    assert path == "/v1/chat/completions"
    assert key == "Bearer secret"
    assert body["model"] == "gpt-4-0314"
    assert body["temperature"] == 0.2
    assert body["max_tokens"] == 1024
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert len(endpoint.requests) == 5
    assert "secret" not in (tmp_path / "out" / "results.json").read_text()
    evaluate(loaded, "mmvp", tmp_path / "out", options, judge=judge_at(endpoint))
    assert len(endpoint.requests) == 5  # judgements are kept
    without = evaluate(loaded, "mmvp", tmp_path / "out", options)
    assert without["scores"] == {}
    assert without["judge"] is None


def test_judge_drops_parameters_that_the_endpoint_rejects_and_remembers_them(endpoint):
    endpoint.rejects = ("max_tokens", "temperature")
    judge = judge_at(endpoint)
    assert judge.temperature == 0.2
    assert judge("", "Is it red?") == "yes"
    limits = [name for *_, body in endpoint.requests for name in body if name.startswith("max")]
    assert limits == ["max_tokens", "max_completion_tokens", "max_completion_tokens"]
    assert endpoint.requests[-1][2].keys() == {"model", "messages", "max_completion_tokens"}
    assert judge.temperature is None
    judge("", "Is it blue?")
    assert len(endpoint.requests) == 4
    endpoint.rejects = ("model",)  # not a parameter that can be left out
    with pytest.raises(JudgeRejectionError, match=r"rejected the request \(HTTP 400: .*'model' is not supported"):
        judge("", "Is it green?")
    assert len(endpoint.requests) == 5


@pytest.mark.parametrize(
    ("status", "requests", "kind"),
    [
        (503, 5, ConnectionError),
        (429, 5, ConnectionError),
        (401, 1, JudgeRejectionError),
        (404, 1, JudgeRejectionError),
    ],
)
def test_judge_repeats_only_failures_that_may_pass(endpoint, status, requests, kind):
    endpoint.failures = [status] * 9
    with pytest.raises(ConnectionError, match=f"HTTP {status}.*run the same command again") as raised:
        judge_at(endpoint)("", "Is it red?")
    assert type(raised.value) is kind
    assert len(endpoint.requests) == requests


def test_rejected_change_of_parameters_is_not_remembered(endpoint):
    endpoint.rejects = ("max_tokens", "max_completion_tokens")
    judge = judge_at(endpoint)
    with pytest.raises(JudgeRejectionError, match="max_completion_tokens"):
        judge("", "Is it red?")
    assert judge.settings == {"temperature": 0.2, "max_tokens": 1024}


@pytest.mark.usefixtures("few_tokens", "few_resamples")
def test_results_note_judgements_without_a_temperature(loaded, mmvp_folder, tmp_path, endpoint):
    options = EvaluationOptions(protocol="official", data=str(mmvp_folder), limit=2)
    endpoint.rejects = ("temperature",)
    for _ in range(2):  # the second run only reads the kept judgements
        results = evaluate(loaded, "mmvp", tmp_path / "out", options, judge=judge_at(endpoint))
        assert results["notes"]["judge"].startswith("2 judgements at the endpoint's own temperature")
    assert len(endpoint.requests) == 3


def write_llava_bench(folder):
    (folder / "images").mkdir(parents=True)
    make_image(0).save(folder / "images" / "001.jpg")
    questions = [
        {"question_id": k, "image": "001.jpg", "text": "What is the dog?", "category": category}
        for k, category in enumerate(("conv", "detail", "complex"))
    ]
    answers = [{"question_id": k, "text": "A dog."} for k in range(3)]
    context = [{"image": "001.jpg", "caption": "A dog."}]
    for name, rows in (("questions", questions), ("context", context), ("answers_gpt4", answers)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.usefixtures("few_tokens", "few_resamples")
def test_llava_bench_with_and_without_a_judge(loaded, tmp_path, endpoint):
    options = EvaluationOptions(data=str(write_llava_bench(tmp_path / "data")))
    results = evaluate(loaded, "llava_bench", tmp_path / "out", options)
    assert results["scores"] == {}
    assert results["judge"] is None
    assert results["notes"]["judge"].startswith("absent: 3 replies are written and not judged")
    assert len(read_records(tmp_path / "out" / "samples.jsonl")) == 3
    endpoint.answer = "8 6\nGood."
    results = evaluate(loaded, "llava_bench", tmp_path / "out", options, judge=judge_at(endpoint))
    assert results["scores"] == {"all": 75.0, "conv": 75.0, "detail": 75.0, "complex": 75.0}
    assert results["judge"] == judge_at(endpoint).name
    assert "judge" not in results["notes"]
    assert read_records(tmp_path / "out" / "samples.jsonl")[0]["judgment"] == "8 6\nGood."
    assert "reviews" not in results["notes"]
    endpoint.answer = None  # the judge refuses: counted as published, and noted
    judge = EndpointJudge("another", f"http://127.0.0.1:{endpoint.server_port}/v1")
    results = evaluate(loaded, "llava_bench", tmp_path / "out", options, judge=judge)
    assert results["scores"]["all"] == 100.0
    assert results["notes"]["reviews"].startswith("3 do not begin with two")


@pytest.mark.usefixtures("few_resamples")
def test_blink_judges_only_replies_that_its_parser_cannot_read(loaded, blink_folder, tmp_path, endpoint, monkeypatch):
    replies = {"val_Counting_1": "(B)", "val_Jigsaw_1": "the first one"}
    monkeypatch.setattr(Responder, "reply", lambda self, samples, *a, **k: [replies.get(s.id, "(A)") for s in samples])
    options = EvaluationOptions(protocol="official", data=str(blink_folder))
    endpoint.answer = "(A)"
    results = evaluate(loaded, "blink", tmp_path / "out", options, judge=judge_at(endpoint))
    assert len(endpoint.requests) == 1
    assert "Answer: the first one" in endpoint.requests[0][2]["messages"][0]["content"]
    assert results["scores"]["Jigsaw"] == 100
    assert results["scores"]["Counting"] == 50
    without = evaluate(loaded, "blink", tmp_path / "other", options)
    assert without["scores"]["Jigsaw"] == 50
    assert without["unparsed"] == 1


def test_judge_that_is_unavailable(endpoint):
    endpoint.failures = [401]
    with pytest.raises(
        ConnectionError, match=r"'gpt-4-0314' at .* rejected the request .*401.*\. The replies are kept"
    ):
        judge_at(endpoint)("be helpful", "hello")
    assert len(endpoint.requests) == 1
    with pytest.raises(ValueError, match=r"'http://localhost/v1' needs the name of the judge .* Add --judge MODEL"):
        make_judge(None, "http://localhost/v1")
    with pytest.raises(ValueError, match="'ftp://x'"):
        EndpointJudge("m", "ftp://x")


def test_local_judge_works_without_a_network_and_reads_only_safetensors(tmp_path, monkeypatch):
    def refuse(*args: object) -> None:
        raise AssertionError(f"Connected to {args}.")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    raw = Tokenizer(
        models.WordLevel(
            {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", "8", "7", "yes", "no", "rate", "this"])}, "<unk>"
        )
    )
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
        max_position_embeddings=2048,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    judge = make_judge(str(tmp_path))
    judge.model.generation_config.max_new_tokens = 8
    assert "local" in judge.name
    assert judge("rate", "this 8") == judge("rate", "this 8")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "plain")
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="has no chat template"):
        make_judge(str(tmp_path / "plain"))
    (tmp_path / "plain" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "plain" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin, a pickle.*Run `sdllava convert"):
        make_judge(str(tmp_path / "plain"))


# ------------------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.usefixtures("few_tokens", "few_resamples")
def test_unreadable_image_keeps_earlier_replies(loaded, tmp_path):
    folder = write_mmvp(tmp_path / "data")
    options = EvaluationOptions(data=str(folder), batch_size=1)
    (folder / "MMVP Images" / "5.jpg").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"'5\.jpg' cannot be read.* The first \d replies are kept in .*out"):
        evaluate(loaded, "mmvp", tmp_path / "out", options)
    kept = read_records(tmp_path / "out" / "samples.partial-0.jsonl")
    assert kept
    make_image(5).save(folder / "MMVP Images" / "5.jpg")
    assert evaluate(loaded, "mmvp", tmp_path / "out", options)["samples"] == 6


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
    assert results["notes"]["empty replies"] == "1 replies are empty and count as wrong"


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
