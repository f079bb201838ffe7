"""Clients of the loopback Hub in forked processes, which need not import the libraries again."""

import importlib
import json
import os
import subprocess
import tempfile
from pathlib import Path

import forks
import huggingface_hub
import transformers
from loopback_hub import TOKEN, LoopbackHub
from typer.testing import CliRunner

from sdllava.commands.main import app


def become_client(hub: LoopbackHub, home: Path, token: str | None = TOKEN) -> None:
    """Make this process, a fork, a client of the Hub with an empty cache, as `LoopbackHub.environment` describes it."""
    os.environ.update(environment := hub.environment(home, token))
    for name in set(os.environ) - set(environment):
        del os.environ[name]
    importlib.reload(huggingface_hub.constants)
    huggingface_hub.close_session()
    transformers.utils.hub._hf_api = None  # of another Hub, where an earlier test of this process used one


def run_command(
    hub: LoopbackHub, home: Path, *arguments: object, token: str | None = TOKEN
) -> subprocess.CompletedProcess:
    """Run a `sdllava` command in a client of the Hub."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")

        def run() -> None:
            become_client(hub, home, token)
            result = CliRunner().invoke(app, list(map(str, arguments)))
            report.write_text(json.dumps([result.exit_code, result.stdout, result.stderr]))

        forks.run(run, Path(folder, "log"))
        return subprocess.CompletedProcess(arguments, *json.loads(report.read_text()))
