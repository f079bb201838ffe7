"""Wrong invocations of the command line: an error message, no traceback; those that need no model import no torch."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

WRONG = """
ask
ask p.png
ask p.png ''
ask p.png '   '
ask p.png What? Where? ''
ask p.png p.png What?
ask p.png What? --guidance nan
ask p.png What? --guidance inf
ask p.png What? --guidance=-inf
ask p.png What? --guidance four
ask p.png What? --max-new-tokens 0
ask p.png What? --max-new-tokens=-3
ask p.png What? --max-new-tokens many
ask p.png What? --heatmap heat.gif
ask p.png What? --heatmap missing/heat.png
ask p.png What? --dtype float8
ask p.png What? --model ./missing
ask p.png What? --model p.png
ask p.png What? --model 'two words'
ask p.png What? --model a/b/c
ask p.png What? --model ''
ask p.png What? --unknown
compose
compose out --guidance nan
compose out --field grid_size
compose out --field =3
compose out --field 'grid_size={'
compose out --diffusion ./missing
compose out --llava a/b --vision c/d
compose out --fusion nonsense
compose out --preset nonsense
compose out --timestep early
taps ./missing
taps a/b/c
taps --image-size 4
convert
convert a
evaluate
evaluate --model x
evaluate --benchmark mmvp
evaluate --model x --benchmark nonsense
evaluate --model x --benchmark mmvp,nonsense
evaluate --model ./missing --benchmark mmvp
evaluate --model x --benchmark mmvp --batch-size 0
evaluate --model x --benchmark mmvp --batch-size=-1
evaluate --model x --benchmark mmvp --guidance nan
evaluate --model x --benchmark mmvp --guidance four
evaluate --model x --benchmark mmvp --guidance ,
evaluate --model x --benchmark mmvp --sweep scale=1,2
evaluate --model x --benchmark mmvp --sweep guidance=
evaluate --model x --benchmark mmvp --sweep guidance=1,1
evaluate --model x --benchmark mmvp --sweep guidance=1,2 --guidance 3
evaluate --model x --benchmark mmvp --dtype float8
evaluate --model x --benchmark mmvp --limit some
evaluate --model x --benchmark mmvp --plot a.png
evaluate results
evaluate --compare
match
match --model x
match --model x --benchmark nonsense
match --model x --benchmark mmvp_vlm --image p.png --text a
match --model x --image p.png
match --model x --text a
match --model x --benchmark mmvp_vlm --timesteps early
match --model x --benchmark mmvp_vlm --timesteps 1.5
match --model x --benchmark mmvp_vlm --trials 0
match --model ./missing --benchmark mmvp_vlm
inspect nonsense
inspect attention p.png
inspect attention p.png What? -o a.gif
inspect attention p.png What? -o missing/a.png
inspect attention p.png What? -o a.png --layers ''
inspect attention p.png What? -o a.png --timesteps early
inspect features p.png -o a.bmp
inspect features p.png -o a.png --fit-per colour
inspect features p.png -o a.png --guidance-scales nan
inspect features p.png -o a.png --timesteps 1.5
inspect features p.png -o a.png --batch-size 0
inspect delta p.png -o a.png
inspect delta p.png What? -o missing/a.png
inspect similarity -o a.png --reference x --sweep y
inspect cka -o a.xlsx
inspect sweep p.png
inspect sweep p.png -o out --batch-size 0
train
train --config nonsense/recipe
train --config=nonsense/recipe
train --config own-data/full --per_device_train_batch_size 0
train --config own-data/full --global_batch_size=-4
merge
merge a
cache
cache --output x --kind nonsense
cache --output x --kind latents --batch-size 0
cache --output x --kind latents --dtype float8
push
push missing me/model
push missing me/model/again
push missing 'two words'
serve
serve ./missing
serve mini --port 0
serve mini --port=-1
serve mini --port 70000
serve mini --port http
serve mini --max-queue 0
serve mini --max-images=-1
serve mini --request-seconds 0
demo --port=-1
demo --port 65536
demo --model ./missing
mini nonsense
mini scenes
mini scenes out --split nonsense
recipes nonsense
doctor more
nonsense
--nonsense
"""
"""One command line per line. None of them needs a model, and nothing is written."""

SCRIPT = """
import json, shlex, sys, time
from typer.testing import CliRunner
from sdllava.commands.main import app, quieten_libraries

quieten_libraries()
runner, found = CliRunner(), []
for line in sys.stdin.read().strip().splitlines():
    begin, heavy = time.process_time(), "torch" in sys.modules
    result = runner.invoke(app, shlex.split(line))
    is_expected = result.exception is None or isinstance(result.exception, SystemExit)
    found.append(
        {
            "line": line,
            "status": result.exit_code,
            "error": "" if is_expected else repr(result.exception),
            "message": result.stderr,
            "imports_torch": not heavy and "torch" in sys.modules,
            "seconds": time.process_time() - begin,
        }
    )
print(json.dumps(found))
"""


def test_100_wrong_invocations_give_an_error_without_a_traceback_torch_or_files(tmp_path):
    assert len(WRONG.strip().splitlines()) >= 100
    (tmp_path / "p.png").write_bytes(b"not an image")
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, input=WRONG, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    wrong = [
        entry
        for entry in found
        if entry["status"] not in (1, 2)
        or entry["error"]
        or entry["imports_torch"]
        or not entry["message"].strip()
        or entry["seconds"] > 2
    ]
    assert not wrong, json.dumps(wrong, indent=1)
    assert [path.name for path in Path(tmp_path).iterdir()] == ["p.png"]


@pytest.mark.parametrize("line", ["ask p.png ''", "evaluate --model x --benchmark nonsense", "serve mini --port=-1"])
def test_a_check_without_a_model_takes_less_than_2_seconds(tmp_path, line):
    script = "from sdllava.commands.main import main; main()"
    measured = (
        "import resource, subprocess, sys; "
        "status = subprocess.run(sys.argv[1:], stderr=subprocess.DEVNULL).returncode; "
        "use = resource.getrusage(resource.RUSAGE_CHILDREN); print(status, use.ru_utime + use.ru_stime)"
    )
    command = [sys.executable, "-c", measured, sys.executable, "-c", script, *shlex.split(line)]
    status, seconds = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120).stdout.split()
    assert int(status) in (1, 2)
    assert float(seconds) < 2
