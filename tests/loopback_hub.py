"""A small Hub on the loopback interface: the part of the Hub's HTTP API that `huggingface_hub` and `transformers` use.

Repositories of models, commits, branches, pull requests, the LFS protocol with resumable results, file downloads with
etags, ranges and redirects, listings, tokens. Everything is in memory. Point clients at it with `environment()`.
"""

import base64
import hashlib
import json
import os
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN, USER = "hf_loopback", "tester"


@dataclass
class File:
    """A file of a commit; `lfs` is its SHA-256 where it is stored as a large file."""

    content: bytes
    lfs: str | None = None

    @property
    def oid(self) -> str:
        """git's name of the blob, which for a large file is that of its pointer."""
        blob = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    @property
    def pointer(self) -> bytes:
        form = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize {}\n"
        return form.format(self.lfs, len(self.content)).encode()

    @property
    def etag(self) -> str:
        return self.lfs or self.oid


@dataclass
class Repository:
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, files: dict[str, File], message: str) -> str:
        listing = json.dumps([message, len(self.commits), {name: file.oid for name, file in files.items()}])
        oid = hashlib.sha1(listing.encode()).hexdigest()
        self.commits[oid], self.refs[ref], self.messages[oid] = files, oid, message
        return oid

    def resolve(self, revision: str) -> str | None:
        return self.refs.get(revision) or (revision if revision in self.commits else None)


class HubError(Exception):
    def __init__(self, status: int, message: str, code: str | None = None):
        self.status, self.message, self.code = status, message, code


class LoopbackHub:
    """The server and what it holds. Large files are downloaded from a second host, as from the Hub's."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.broken_uploads = self.broken_downloads = 0
        self.stalled: threading.Event | None = None
        self.resume = threading.Event()
        self.requests: list[str] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
        hosts = zip(("127.0.0.1", "localhost"), self.servers, strict=True)  # clients follow redirects to the same host
        self.endpoint, self.large_file_host = (f"http://{name}:{server.server_port}" for name, server in hosts)

    @contextmanager
    def running(self):
        threads = [threading.Thread(target=server.serve_forever, daemon=True) for server in self.servers]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            for server, thread in zip(self.servers, threads, strict=True):
                server.shutdown()
                server.server_close()
                thread.join()

    def break_uploads(self, count: int) -> None:
        """Break off that many of the next large-file uploads half-way."""
        self.broken_uploads = count

    def break_downloads(self, count: int) -> None:
        """Break off that many of the next large-file downloads half-way."""
        self.broken_downloads = count

    def stall_uploads(self) -> threading.Event:
        """Read half of the next large file and wait until `resume` is set. The returned event is set while it waits."""
        self.stalled = threading.Event()
        self.resume.clear()
        return self.stalled

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """Environment of a client process with an empty cache: this Hub only, Xet off."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        ours = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        ours |= {
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }
        return kept | ours | ({} if token is None else {"HF_TOKEN": token})

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        repository = self.repositories[repo_id]
        return {name: file.content for name, file in repository.commits[repository.resolve(revision)].items()}


_MODEL = r"/api/models/(?P<repo>[^/]+/[^/]+)"
_ROUTES = {
    ("POST", r"/api/repos/create"): "create_repository",
    ("POST", r"/api/validate-yaml"): "validate_card",
    ("GET", r"/api/whoami-v2"): "whoami",
    ("POST", _MODEL + r"/preupload/(?P<revision>[^/]+)"): "preupload",
    ("POST", _MODEL + r"/commit/(?P<revision>[^/]+)"): "commit",
    ("POST", _MODEL + r"/branch/(?P<branch>[^/]+)"): "create_branch",
    ("POST", _MODEL + r"/paths-info/(?P<revision>[^/]+)"): "paths_info",
    ("GET", _MODEL + r"/tree/(?P<revision>[^/]+)(/(?P<path>.+))?"): "tree",
    ("GET", _MODEL + r"/refs"): "refs",
    ("GET", _MODEL + r"/discussions"): "discussions",
    ("GET", _MODEL + r"(/revision/(?P<revision>[^/]+))?"): "info",
    ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch"): "lfs_batch",
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})"): "lfs_upload",
    ("POST", r"/lfs/verify"): "lfs_verify",
    ("GET", r"/cdn/(?P<oid>[0-9a-f]{64})"): "large_file",
    ("GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)"): "download",
}


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        self._answer("GET")

    do_HEAD = do_GET

    def do_POST(self):
        self._answer("POST")

    def do_PUT(self):
        self._answer("PUT")

    def _answer(self, method: str):
        url = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(url.query).items()}
        self.body_is_read = False
        self.hub.requests.append(f"{self.command} {url.path}")
        try:
            for (verb, pattern), name in _ROUTES.items():
                if verb == method and (match := re.fullmatch(pattern, url.path)):
                    arguments = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                    return getattr(self, name)(**arguments)
            raise HubError(404, f"no route {method} {url.path}")
        except HubError as error:
            if not self.body_is_read:
                self.body()
            headers = {"X-Error-Message": error.message}
            if error.code:
                headers["X-Error-Code"] = error.code
            self._send({"error": error.message}, error.status, headers)

    # who may do what

    def user(self) -> str | None:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if given and given != TOKEN:
            raise HubError(401, "Invalid credentials in Authorization header")
        return USER if given else None

    def may_write(self) -> None:
        if self.user() is None:
            raise HubError(401, "Invalid username or password.")

    def repository(self, repo: str) -> Repository:
        found = self.hub.repositories.get(repo)
        if found is None or (found.private and self.user() is None):
            raise HubError(404 if self.user() else 401, "Repository not found", "RepoNotFound")
        if found.gated:
            raise HubError(403 if self.user() else 401, f"Access to model {repo} is restricted.", "GatedRepo")
        self.user()
        return found

    def at(self, repo: str, revision: str) -> tuple[str, dict[str, File]]:
        repository = self.repository(repo)
        oid = repository.resolve(revision)
        if oid is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid, repository.commits[oid]

    # repositories

    def create_repository(self):
        self.may_write()
        wanted = self.json()
        repo = f"{wanted.get('organization') or USER}/{wanted['name']}"
        url = {"url": f"{self.hub.endpoint}/{repo}", "name": repo}
        if repo in self.hub.repositories:
            return self._send({"error": "You already created this model repo", **url}, 409)
        repository = self.hub.repositories[repo] = Repository(private=wanted.get("visibility") == "private")
        repository.commit("main", {}, "initial commit")
        self._send(url)

    def whoami(self):
        self.may_write()
        self._send({"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def validate_card(self):
        self.json()
        self._send({"errors": [], "warnings": []})

    def create_branch(self, repo: str, branch: str):
        self.may_write()
        repository = self.repository(repo)
        self.json()
        if branch in repository.refs:
            raise HubError(409, f"Reference refs/heads/{branch} already exists")
        repository.refs[branch] = repository.refs["main"]
        self._send({})

    def info(self, repo: str, revision: str = "main"):
        oid, files = self.at(repo, revision)
        siblings = [{"rfilename": name} for name in sorted(files)]
        shown = {"id": repo, "modelId": repo, "sha": oid, "private": self.repository(repo).private, "tags": []}
        self._send({**shown, "siblings": siblings, "downloads": 0, "likes": 0})

    def refs(self, repo: str):
        refs = self.repository(repo).refs
        branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": oid} for n, oid in refs.items()]
        self._send({"branches": branches, "tags": [], "converts": []})

    def discussions(self, repo: str):
        self.repository(repo)
        self._send({"discussions": [], "count": 0, "start": 0})

    def tree(self, repo: str, revision: str, path: str = ""):
        _, files = self.at(repo, revision)
        prefix = f"{path}/" if path else ""
        inside = {name.removeprefix(prefix): file for name, file in files.items() if name.startswith(prefix)}
        if path and not inside:
            raise HubError(404, f"{path} does not exist on {revision}", "EntryNotFound")
        folders = {str(parent) for name in inside for parent in Path(name).parents if str(parent) != "."}
        if self.query.get("recursive", "false").lower() != "true":
            inside = {name: file for name, file in inside.items() if "/" not in name}
            folders = {name for name in folders if "/" not in name}
        entries = [_entry(prefix + name, file) for name, file in inside.items()]
        entries += [{"type": "directory", "path": prefix + name, "oid": "0" * 40, "size": 0} for name in folders]
        self._send(sorted(entries, key=lambda entry: entry["path"]))

    def paths_info(self, repo: str, revision: str):
        _, files = self.at(repo, revision)
        body = self.body()
        form = self.headers.get("Content-Type", "").startswith("application/json")
        paths = json.loads(body)["paths"] if form else parse_qs(body.decode())["paths"]
        self._send([_entry(path, files[path]) for path in paths if path in files])

    # upload

    def preupload(self, repo: str, revision: str):
        self.may_write()
        _, files = self.at(repo, revision)
        modes = []
        for wanted in self.json()["files"]:
            known = files.get(wanted["path"])
            binary = b"\0" in base64.b64decode(wanted["sample"]) or wanted["path"].endswith(".safetensors")
            mode = "lfs" if binary or wanted["size"] > 10**7 else "regular"
            modes.append(
                {"path": wanted["path"], "uploadMode": mode, "shouldIgnore": False, "oid": known and known.etag}
            )
        self._send({"files": modes})

    def lfs_batch(self, repo: str):
        self.may_write()
        self.repository(repo)
        objects = []
        for wanted in self.json()["objects"]:
            shown = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.large_files:
                upload = {"href": f"{self.hub.endpoint}/lfs/{wanted['oid']}"}
                shown["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.endpoint}/lfs/verify"}}
            objects.append(shown)
        self._send({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str):
        if self.hub.broken_uploads > 0:
            self.hub.broken_uploads -= 1
            self.rfile.read(int(self.headers["Content-Length"]) // 2)
            self.close_connection = True
            return self.connection.close()
        if self.hub.stalled is not None:
            self.rfile.read(int(self.headers["Content-Length"]) // 2)
            self.hub.stalled.set()
            self.hub.resume.wait(60)
            self.close_connection = True
            return
        content = self.body()
        if hashlib.sha256(content).hexdigest() != oid:
            raise HubError(400, f"the content is not that of {oid}")
        self.hub.large_files[oid] = content
        self._send({})

    def lfs_verify(self):
        wanted = self.json()
        if len(self.hub.large_files.get(wanted["oid"], b"")) != wanted["size"]:
            raise HubError(400, f"{wanted['oid']} was not uploaded whole")
        self._send({})

    def commit(self, repo: str, revision: str):
        self.may_write()
        repository = self.repository(repo)
        oid, files = self.at(repo, revision)
        files, message = dict(files), ""
        for line in self.body().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]))
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.hub.large_files:
                    raise HubError(400, f"{value['path']} was not uploaded")
                files[value["path"]] = File(self.hub.large_files[value["oid"]], lfs=value["oid"])
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise HubError(400, f"no operation {entry['key']}")
        ref = revision if oid != revision else "main"
        if self.query.get("create_pr"):
            ref = f"refs/pr/{sum(name.startswith('refs/pr/') for name in repository.refs) + 1}"
        made = repository.commit(ref, files, message)
        answer = {"commitUrl": f"{self.hub.endpoint}/{repo}/commit/{made}", "commitOid": made}
        if self.query.get("create_pr"):
            answer["pullRequestUrl"] = f"{self.hub.endpoint}/{repo}/discussions/{ref.removeprefix('refs/pr/')}"
        self._send(answer)

    # download

    def download(self, repo: str, revision: str, path: str):
        oid, files = self.at(repo, revision)
        if path not in files:
            raise HubError(404, "Entry not found", "EntryNotFound")
        file = files[path]
        headers = {"X-Repo-Commit": oid, "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
        if file.lfs:
            linked = {"X-Linked-Etag": f'"{file.lfs}"', "X-Linked-Size": str(len(file.content))}
            return self._send(b"", 302, {**headers, **linked, "Location": f"{self.hub.large_file_host}/cdn/{file.lfs}"})
        self._send_file(file.content, headers)

    def large_file(self, oid: str):
        content = self.hub.large_files[oid]
        if self.command == "GET" and self.hub.broken_downloads > 0:
            self.hub.broken_downloads -= 1
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return
        self._send_file(content, {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def _send_file(self, content: bytes, headers: dict[str, str]):
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return self._send(content, 200, headers)
        start, end = int(wanted[1]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
        if start >= len(content):
            raise HubError(416, "range not satisfiable")
        self._send(content[start : end + 1], 206, {**headers, "Content-Range": f"bytes {start}-{end}/{len(content)}"})

    # HTTP

    def body(self) -> bytes:
        self.body_is_read = True
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def json(self):
        return json.loads(self.body() or b"{}")

    def _send(self, content, status: int = 200, headers: dict[str, str] | None = None):
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _entry(path: str, file: File) -> dict:
    entry = {"type": "file", "path": path, "size": len(file.content), "oid": file.oid}
    if file.lfs:
        entry["lfs"] = {"oid": file.lfs, "size": len(file.content), "pointerSize": len(file.pointer)}
    return entry
