"""Hostile, malformed and expensive requests: each gets its HTTP status, and the server stays responsive."""

import base64
import functools
import http.server
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from image_mutations import encoded, png
from PIL import Image

pytest.importorskip("starlette", reason="the extra serve is not installed")
from sdllava.serving import media
from sdllava.serving.app import ChatApp
from sdllava.serving.jobs import Answer, Job
from sdllava.serving.limits import Limits, RequestError
from sdllava.serving.server import served_names

LIMITS = Limits(max_body_bytes=200_000, max_images=2, max_image_bytes=50_000, max_image_pixels=10_000,
                max_new_tokens=32, max_beams=2, max_question_chars=500, max_queue=3, request_seconds=1.5)  # fmt: skip


class Echo:
    """Answers with the text of the last message; "wait" waits until nobody needs the answer."""

    def __init__(self):
        self.executor = ThreadPoolExecutor(1)
        self.jobs, self.images = [], []

    def prepare(self, request, images, end) -> Job:
        self.images.append(images)
        return Job(request, end)

    def submit(self, job):
        return self.executor.submit(self.answer, job)

    def answer(self, job) -> Answer:
        self.jobs.append(job)
        text = " ".join(part.get("text", "") for part in job.request.messages[-1]["content"]).strip()
        if text == "fail":
            raise RuntimeError("/secret/path")
        if text.startswith("wait"):
            if text == "wait streaming":
                job.send("one ")
            while not job.is_over:
                time.sleep(0.01)
            raise RequestError("The request took too long.", 504)
        for piece in text.split(" "):
            job.send(piece)
        return Answer(text, "stop", 7, 3)


def start(app):
    import uvicorn

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app.starlette(), port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)

    def stop():
        server.should_exit = True
        thread.join(10)

    return f"http://127.0.0.1:{port}", stop


@pytest.fixture(scope="module")
def app():
    return ChatApp(Echo(), ["model"], LIMITS)


@pytest.fixture(scope="module")
def client(app):
    address, stop = start(app)
    with httpx.Client(base_url=address, trust_env=False, timeout=20) as opened:
        yield opened
    stop()


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


GOOD_IMAGE = data_url(encoded(Image.new("RGB", (20, 10)), "PNG"))


def image(url) -> dict:
    return {"type": "image_url", "image_url": {"url": url}}


def body(*content, **fields) -> dict:
    parts = [{"type": "text", "text": c} if isinstance(c, str) else c for c in content or ("hello",)]
    return {"model": "model", "messages": [{"role": "user", "content": parts}], **fields}


def post(client, request, **options):
    content = request if isinstance(request, bytes) else json.dumps(request)
    return client.post("/v1/chat/completions", content=content, **options)


def nested(depth: int) -> bytes:
    return b'{"model": "model", "messages": ' + b"[" * depth + b"]" * depth + b"}"


MALFORMED = {
    "empty": (b"", 400, "is not valid JSON"),
    "not-json": (b"{", 400, "is not valid JSON"),
    "latin-1": ('{"model": "é"}'.encode("latin-1"), 400, "is not valid JSON"),
    "deep": (nested(50_000), 400, "is not valid JSON"),
    "deep-content": (body({"type": "text", "text": [[[[]]]]}), 400, "neither a text nor an image"),
    "list": ([], 400, "The body is a list"),
    "nan": (b'{"model": "model", "temperature": NaN}', 400, "is not valid JSON"),
    "no-model": ({"messages": []}, 400, "Field 'model' is missing. Use 'model'"),
    "other-model": (body() | {"model": "../../etc"}, 404, "is not served here"),
    "no-messages": ({"model": "model"}, 400, "Field 'messages' is missing or empty"),
    "empty-messages": ({"model": "model", "messages": []}, 400, "Field 'messages' is missing or empty"),
    "messages-text": ({"model": "model", "messages": "hi"}, 400, "Field 'messages' is missing or empty"),
    "message-number": ({"model": "model", "messages": [7]}, 400, "Message 0 has no role. Use one of system, developer"),
    "role": ({"model": "model", "messages": [{"role": "root", "content": "x"}]}, 400, "has the role 'root'. Use one"),
    "role-list": ({"model": "model", "messages": [{"role": [], "content": "x"}]}, 400, "the role of type list. Use"),
    "late-system": (
        {"model": "model", "messages": [{"role": "user", "content": "x"}, {"role": "developer", "content": "x"}]}, 400,
        "Message 1 has the role 'developer'. Only the first message can have it"
    ),
    "content-number": ({"model": "model", "messages": [{"role": "user", "content": 5}]}, 400, "has no content"),
    "content-none": ({"model": "model", "messages": [{"role": "user", "content": None}]}, 400, "has no content"),
    "part-number": ({"model": "model", "messages": [{"role": "user", "content": [5]}]}, 400, "neither a text nor"),
    "part-audio": (body({"type": "input_audio", "input_audio": {}}), 400, "neither a text nor an image"),
    "assistant-last": (
        {"model": "model", "messages": [{"role": "assistant", "content": "x"}]}, 400, "The last message is not"
    ),
    "many-messages": (
        {"model": "model", "messages": [{"role": "user", "content": ""}] * 300}, 400, "There are 300 messages"
    ),
    "surrogate": (body("\ud800"), 400, "has a surrogate"),
    "url-number": (body(image(5)), 400, "neither a text nor an image"),
    "path": (body(image("/etc/passwd")), 400, "'/etc/passwd' is neither a URL nor a data URL"),
    "file": (body(image("file:///etc/passwd")), 400, "is neither a URL nor a data URL"),
    "base64": (body(image("data:image/png;base64,@@@@")), 400, "is not valid base64"),
    "parameters": (body(image("data:image/png" + ";a=b" * 9 + ";base64,")), 400, "is neither a URL nor a data URL"),
    "json": (body(response_format={"type": "json_object"}), 400, "Field 'response_format' is not supported"),
    "tool": (body(tool_choice="required"), 400, "Field 'tool_choice' is not supported"),
    "tools": (body(tools=[{"type": "function"}], tool_choice="auto"), 400, "Field 'tools' is not supported"),
    "no-nucleus": (body(top_p=0), 400, "Field 'top_p' is 0. Use a number in 1e-06..1"),
    "not-an-image": (body(image(data_url(b"rubbish"))), 400, "is not an image that Pillow can read"),
    "truncated": (body(image(data_url(encoded(Image.effect_noise((50, 50), 90), "PNG")[:500]))), 400, "truncated"),
    "thin": (body(image(data_url(png(1, 9000, bytes(18_000))))), 400, "is too thin"),
    "pixels": (body(image(data_url(png(200, 100, b"")))), 400, "Give an image of at most 0 million pixels"),
    "bomb": (body(image(data_url(png(30_000, 30_000, b"")))), 400, "may be a decompression bomb"),
    "image-bytes": (body(image(data_url(bytes(60_000)))), 413, "An image has more than 50000 bytes"),
    "images": (body(*[image(GOOD_IMAGE)] * 3), 400, "There are 3 images. Send at most 2"),
    "many-images": (body(*[image("data:,")] * 2000), 400, "There are 2000 images"),
    "question": (body("x" * 501), 400, "The text has 501 characters. Send at most 500"),
    "tokens": (body(max_tokens=33), 400, "Field 'max_tokens' is 33. Use an integer in 1..32"),
    "no-tokens": (body(max_tokens=0), 400, "Field 'max_tokens' is 0"),
    "tokens-text": (body(max_tokens="9"), 400, "Field 'max_tokens' is '9'"),
    "beams": (body(num_beams=5000), 400, "Field 'num_beams' is 5000. Use an integer in 1..2"),
    "beams-stream": (body(num_beams=2, stream=True), 400, "A beam search can neither be streamed"),
    "generation-config": (body(generation_config='{"num_beams": 5000}'), 400, "'generation_config' is not supported"),
    "many-stops": (body(stop=["a"] * 5), 400, "a list of at most 4 strings"),
    "stop-number": (body(stop=[3]), 400, "A stop string is 3"),
    "long-stop": (body(stop="x" * 65), 400, "Use 1 to 64 characters"),
    "temperature": (body(temperature=-1), 400, "Field 'temperature' is -1. Use a number in 0..2"),
    "infinite": (json.dumps(body(top_p=9)).replace("9", "1e999").encode(), 400, "Field 'top_p' is inf"),
    "several": (body(n=3), 400, "Field 'n' is 3"),
    "stream": (body(stream="yes"), 400, "Field 'stream' is 'yes'. Use true or false"),
    "large": (body(image("data:image/png;base64," + "A" * 300_000)), 413, "The body has more than 200000 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_request_returns_4xx_with_a_message(client, kind):
    request, status, message = MALFORMED[kind]
    response = post(client, request)
    assert response.status_code == status
    assert message in response.json()["error"]["message"]


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/", 404), ("GET", "/v1/chat/completions", 405)])
def test_unknown_paths_and_methods_return_an_error_in_the_same_format(client, method, path, status):
    response = client.request(method, path)
    assert response.status_code == status
    assert response.json()["error"]["code"] == status


def test_a_good_request_returns_the_answer(client, app):
    system = {"role": "system", "content": "Be brief."}
    request = body(image(GOOD_IMAGE), "What is it?", temperature=0, user="me", tools=[], stop="?", max_tokens=5, seed=0)
    request["messages"].insert(0, system)
    response = post(client, request).json()
    assert response["choices"][0]["message"] == {"role": "assistant", "content": "What is it?"}
    assert response["usage"] == {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    assert response["model"] == "model"
    assert [x.size for x in app.worker.images[-1]] == [(20, 10)]
    checked = app.worker.jobs[-1].request
    assert (checked.temperature, checked.max_new_tokens, checked.stop, checked.seed) == (0, 5, ("?",), 0)
    assert checked.messages[0] == system


@pytest.mark.parametrize(
    "field",
    [
        {"response_format": {"type": "text"}},
        {"tool_choice": "none"},
        {"tool_choice": "auto"},
        {"parallel_tool_calls": True},
        {"modalities": ["text"]},
        {"top_p": 0},
        {"stop": ""},
    ],
)
def test_a_value_that_means_the_default_changes_nothing(client, app, field):
    checked = []
    for fields in ({}, field):
        assert post(client, body("What?", temperature=0, **fields)).status_code == 200
        checked.append(app.worker.jobs[-1].request)
    assert checked[0] == checked[1]


def test_the_role_developer_is_that_of_the_system(client, app):
    request = body("What is it?")
    request["messages"].insert(0, {"role": "developer", "content": "Be brief."})
    assert post(client, request).status_code == 200
    assert app.worker.jobs[-1].request.messages[0] == {"role": "system", "content": "Be brief."}


LINES = base64.encodebytes(encoded(Image.effect_noise((20, 10), 80), "PNG")).decode()


@pytest.mark.parametrize("head", ["data:image/png;base64,", "data:image/png;charset=utf-8;base64,"])
@pytest.mark.parametrize(
    "data", [LINES, LINES.replace("\n", "\r\n"), LINES.replace("\n", "")], ids=["lf", "crlf", "one"]
)
def test_a_data_url_has_line_breaks_and_parameters(client, app, head, data):
    assert LINES.count("\n") > 1
    assert post(client, body(image(head + data), "What is it?")).status_code == 200
    assert [x.size for x in app.worker.images[-1]] == [(20, 10)]


def test_line_breaks_do_not_count_as_bytes_of_an_image():
    data = bytes(1000)
    url = "data:image/png;base64," + base64.encodebytes(data).decode()
    assert media.read_data_url(url, 1000) == data
    with pytest.raises(RequestError, match="An image has more than 997 bytes"):
        media.read_data_url(url, 997)


def test_a_body_of_unknown_length_has_the_same_limit(client):
    response = client.post("/v1/chat/completions", content=(b" " * 50_000 for _ in range(6)))
    assert response.status_code == 413


def test_an_error_of_the_server_does_not_show_its_cause(client):
    response = post(client, body("fail"))
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "The server failed. Its log has the cause."


def test_an_answer_that_takes_too_long_returns_504_and_is_cancelled(client, app):
    began = time.monotonic()
    response = post(client, body("wait"))
    assert response.status_code == 504
    assert 1 < time.monotonic() - began < 4
    assert app.worker.jobs[-1].is_over
    assert post(client, body("next")).status_code == 200


def test_a_stream_that_takes_too_long_ends_with_an_error(client):
    lines = [line for line in post(client, body("wait streaming", stream=True)).text.split("\n\n") if line]
    assert json.loads(lines[1][6:])["choices"][0]["delta"] == {"content": "one "}
    assert json.loads(lines[-1][6:])["error"]["code"] == 504


def test_a_stream_has_pieces_a_reason_and_numbers_of_tokens(client):
    text = post(client, body("a b", stream=True, stream_options={"include_usage": True})).text
    events = [line[6:] for line in text.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    pieces = [json.loads(event) for event in events]
    assert [p["choices"][0]["delta"] for p in pieces[1:3]] == [{"content": "a"}, {"content": "b"}]
    assert pieces[3]["choices"][0]["finish_reason"] == "stop"
    assert pieces[4]["usage"]["total_tokens"] == 10


def test_a_full_queue_returns_429_and_the_server_stays_responsive(client):
    with ThreadPoolExecutor(3) as others:
        waiting = [others.submit(post, client, body("wait")) for _ in range(3)]
        while "sdllava_requests_in_flight 3" not in client.get("/metrics").text:
            time.sleep(0.01)
        response = post(client, body())
        began = time.monotonic()
        assert client.get("/health").json() == {"status": "ok"}
        assert time.monotonic() - began < 0.5
    assert response.status_code == 429
    assert "Too many requests" in response.json()["error"]["message"]
    assert {future.result().status_code for future in waiting} == {504}


def connect(client) -> socket.socket:
    return socket.create_connection((client.base_url.host, client.base_url.port), timeout=10)


def test_a_body_that_trickles_returns_504_and_others_are_answered(client):
    with connect(client) as slow:
        slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
        assert post(client, body("quick")).status_code == 200
        assert slow.recv(1000).startswith(b"HTTP/1.1 504")


def test_an_answer_is_cancelled_when_the_client_leaves(client, app):
    content = json.dumps(body("wait")).encode()
    with connect(client) as leaving:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
        before = len(app.worker.jobs)
        leaving.sendall(head.encode() + content)
        while len(app.worker.jobs) == before:
            time.sleep(0.01)
    began = time.monotonic()
    assert post(client, body("next")).status_code == 200
    assert time.monotonic() - began < 1
    assert app.worker.jobs[before].cancelled.is_set()


def test_metrics_count_requests_by_status(client):
    post(client, body("counted"))
    text = client.get("/metrics").text
    counts = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert int(counts['sdllava_requests_total{status="200"}']) >= 1
    assert int(counts["sdllava_requests_in_flight"]) == 0
    assert int(counts['sdllava_tokens_total{kind="answer"}']) >= 3
    assert counts['sdllava_request_seconds_bucket{le="+Inf"}'] == counts["sdllava_request_seconds_count"]


def test_a_bearer_token_is_required_except_for_health():
    address, stop = start(ChatApp(Echo(), ["model"], LIMITS, api_key="secret"))
    with httpx.Client(base_url=address, trust_env=False) as client:
        assert client.get("/health").status_code == 200
        for path in ("/v1/models", "/metrics"):
            assert client.get(path).status_code == 401
        assert post(client, body(), headers={"Authorization": "Bearer wrong"}).status_code == 401
        assert post(client, body(), headers={"Authorization": b"Bearer s\xe9cret"}).status_code == 401
        assert post(client, body(), headers={"Authorization": "Bearer secret"}).status_code == 200
    stop()


# URLs of images


PRIVATE = (
    "127.0.0.1", "10.0.0.1", "172.16.3.4", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
    "255.255.255.255", "::1", "::", "fe80::1", "fc00::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::",
)  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
def test_special_addresses_are_not_public(address):
    assert not media.is_public(address)


@pytest.mark.parametrize("address", ["93.184.215.14", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_other_addresses_are_public(address):
    assert media.is_public(address)


def test_a_domain_contains_its_subdomains_only():
    allowed = functools.partial(media.is_allowed_domain, domains=["example.org"])
    assert allowed("example.org")
    assert allowed("Images.Example.org.")
    assert not any(map(allowed, ("evil-example.org", "example.org.evil.com", "org", "")))


def test_no_url_is_fetched_by_default(client):
    response = post(client, body(image("http://example.org/a.png")))
    assert response.status_code == 400
    assert "Images of 'example.org' are not fetched" in response.json()["error"]["message"]


@pytest.fixture(scope="module")
def files():
    """A web server on this machine: an image, a redirect to itself by its address, one in a circle, a slow answer."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            port = self.server.server_address[1]
            redirects = {
                "/inside": f"http://127.0.0.1:{port}/image",
                "/circle": "/circle",
                "/file": "file:///etc/passwd",
            }
            if self.path in redirects:
                self.send_response(302)
                self.send_header("Location", redirects[self.path])
                self.end_headers()
                return
            self.send_response({"/missing": 404, "/nowhere": 302}.get(self.path, 200))
            if self.path == "/packed":
                self.send_header("Content-Encoding", "gzip")
            self.end_headers()
            data = encoded(Image.new("RGB", (20, 10)), "PNG")
            for _ in range(1000 if self.path == "/long" else 1):
                self.wfile.write(data * (100 if self.path == "/long" else 1))
            if self.path == "/trickle":
                time.sleep(3)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running.server_address[1]
        running.shutdown()


@pytest.fixture
def fetching(monkeypatch, files):
    """A client of a server that may fetch from two domains; `public.test` is resolved to the web server."""
    resolve = media.public_address

    async def resolved(host, port):
        return "127.0.0.1" if host == "public.test" else await resolve(host, port)

    monkeypatch.setattr(media, "public_address", resolved)
    address, stop = start(ChatApp(Echo(), ["model"], LIMITS, media_domains=["public.test", "127.0.0.1", "localhost"]))
    with httpx.Client(base_url=address, trust_env=False, timeout=20) as client:
        yield lambda url: post(client, body(image(url.replace("PORT", str(files))), "ok"))
    stop()


@pytest.mark.parametrize(
    ("url", "status", "message"),
    [
        ("http://public.test:PORT/image", 200, ""),
        ("http://127.0.0.1:PORT/image", 400, "The host '127.0.0.1' of an image is not public"),
        ("http://localhost:PORT/image", 400, "The host 'localhost' of an image is not public"),
        ("http://127.1:PORT/image", 400, "are not fetched"),
        ("http://[::1]:PORT/image", 400, "are not fetched"),
        ("http://public.test@127.0.0.1:PORT/image", 400, "The host '127.0.0.1' of an image is not public"),
        ("http://public.test:PORT/inside", 400, "The host '127.0.0.1' of an image is not public"),
        ("http://public.test:PORT/file", 400, "are not fetched"),
        ("http://public.test:PORT/circle", 400, "is redirected over 3 times"),
        ("http://public.test:PORT/missing", 400, "cannot be fetched (HTTPStatusError)"),
        ("http://public.test:PORT/nowhere", 400, "cannot be fetched (HTTPStatusError)"),
        ("http://public.test:PORT/packed", 200, ""),
        ("http://public.test:PORT/long", 413, "An image has more than 50000 bytes"),
        ("http://public.test:PORT/trickle", 504, "took too long"),
        ("http://public.test:1/", 400, "cannot be fetched (ConnectError)"),
        ("http://public.test:99999999/", 400, "The port 99999999 of an image is not in 1..65535"),
        ("http://", 400, "are not fetched"),
    ],
)
def test_urls_are_fetched_from_allowed_public_hosts_only(fetching, url, status, message):
    response = fetching(url)
    assert response.status_code == status, response.text
    assert message in response.text.replace("\\u0027", "'")


def test_the_model_has_the_name_that_was_typed_and_no_path(tmp_path):
    assert served_names("mini") == ["mini"]
    assert served_names("me/my-model") == ["me/my-model"]
    folder = tmp_path / "my-model"
    folder.mkdir()
    assert served_names(str(folder)) == ["my-model", str(folder)]
