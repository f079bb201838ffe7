"""Judges: an endpoint, a local model, and requests that are rejected or fail."""

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from fixtures_evaluation import make_image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sdllava.evaluation.benchmarks.llava_bench import LLaVABench
from sdllava.evaluation.bootstrap import intervals
from sdllava.evaluation.evaluate import EvaluationOptions, evaluate
from sdllava.evaluation.judge import EndpointJudge, JudgeRejectionError, make_judge
from sdllava.evaluation.responder import Responder
from sdllava.evaluation.results import read_records


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


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("<think>\nHm, 3 or 8?\n</think>\n\n8 6\nGood.", "8 6\nGood."),
        (" <think></think>8 6", "8 6"),
        ("8 6\nIt wrote <think>a</think>.", "8 6\nIt wrote <think>a</think>."),
        ("<think>without an end", "<think>without an end"),
    ],
)
def test_thinking_at_the_beginning_of_a_reply_is_removed(endpoint, answer, expected):
    endpoint.answer = answer
    assert judge_at(endpoint)("", "Rate this.") == expected


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
    endpoint.answer = None  # the judge refuses
    judge = EndpointJudge("another", f"http://127.0.0.1:{endpoint.server_port}/v1")
    results = evaluate(loaded, "llava_bench", tmp_path / "out", options, judge=judge)
    assert results["scores"] == results["intervals_95"] == {}
    assert results["notes"]["reviews"] == "none of 3 begins with two ratings, so the score is absent"
    assert results["notes"]["score"].startswith("absent")


def test_llava_bench_counts_unread_reviews_as_published_where_the_reference_has_a_rating():
    """A bootstrap resample that draws only unread reviews, or ratings of 0, has no score."""
    benchmark = LLaVABench()
    ratings = [("conv", (8.0, 6.0)), ("conv", (-1.0, -1.0)), ("detail", (-1.0, -1.0)), ("complex", (0.0, 5.0))]
    records = [{"id": str(k), "category": group, "ratings": pair} for k, (group, pair) in enumerate(ratings)]
    summary = benchmark.score(records)
    assert summary == {"all": 150.0, "conv": 71.4}
    assert benchmark.notes["reviews"].startswith("2 do not begin with two")
    benchmark.score(records[:1])
    assert "reviews" not in benchmark.notes
    found = intervals(benchmark.units(records), benchmark.scores)
    assert found.keys() == summary.keys()
    assert found["all"][0] < 150 < found["all"][1]


@pytest.mark.usefixtures("few_resamples")
def test_blink_judges_only_replies_that_its_parser_cannot_read(loaded, blink_folder, tmp_path, endpoint, monkeypatch):
    replies = {"val_Counting_1": "(B)", "val_Jigsaw_1": "the first one"}
    monkeypatch.setattr(Responder, "reply", lambda self, samples, *a, **k: [replies.get(s.id, "(A)") for s in samples])
    options = EvaluationOptions(protocol="official", data=str(blink_folder))
    endpoint.answer = "(A)"
    results = evaluate(loaded, "blink", tmp_path / "out", options, judge=judge_at(endpoint))
    ((_, _, request),) = endpoint.requests
    content = request["messages"][0]["content"]
    assert "\nSelect from the following choices?\nOptions: (A) " in content
    assert "Answer: the first one" in content
    assert request["temperature"] == 0.0
    assert results["judge"].endswith(", temperature 0.0")
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
    used = []
    sampled = judge.model.generate
    monkeypatch.setattr(judge.model, "generate", lambda **k: used.append(k) or sampled(**k))
    greedy = judge.with_temperature(0.0)
    assert greedy.name == f"{tmp_path} (local), temperature 0.0"
    for each in (judge, greedy):
        each("rate", "this 8")
    assert [(k["do_sample"], k.get("temperature")) for k in used] == [(True, 0.2), (False, None)]
    switch = "{{ 'no' if enable_thinking is defined and not enable_thinking else 'yes' }}"
    judge.tokenizer.chat_template = "rate " + switch
    generate, prompts = judge.model.generate, []
    monkeypatch.setattr(judge.model, "generate", lambda **k: prompts.append(k["input_ids"]) or generate(**k))
    monkeypatch.setattr(judge.tokenizer, "decode", lambda *a, **k: "<think>\n7</think>\n8 7")
    assert judge("", "this") == "8 7"
    assert prompts[0].tolist() == tokenizer("rate no", return_tensors="pt").input_ids.tolist()
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
