# `make demo` and `make test` set up all they need. PYTHON can be any Python from 3.11 on.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
CONSTRAINTS ?= constraints.txt
WORKERS ?= 2
COUNT ?= 20000

.PHONY: audit demo docs notebooks test test-slow test-all test-oldest test-deepspeed test-lmms test-vllm gpu-report fuzz lint release wheel clean

$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/.dev: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) -e '.[dev]'
	touch $@

demo: $(VENV)/.demo  ## ask the embedded miniature about a picture
	$(BIN)/sdllava mini scene demo-scene.png --seed 27
	$(BIN)/sdllava ask demo-scene.png "What colour is the circle?" "How many objects are there?" --max-new-tokens 16
	@echo "demo-scene.png is described above the answers. One answer in ten about such scenes is wrong, see README.md."

test: $(VENV)/.dev  ## the tests that are neither slow nor need a GPU
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --durations 10

test-slow: $(VENV)/.dev  ## only the slow tests
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "slow and not gpu" --durations 10

test-all: $(VENV)/.dev  ## every test; those that need a GPU skip without one
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "" --durations 10

test-oldest:  ## every test on the oldest versions that pyproject.toml allows
	$(MAKE) test-all VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

fuzz: $(VENV)/.dev  ## 20,000 damaged images through the decoder, others for each run
	$(BIN)/python -W ignore tests/faults/image_mutations.py --count $(COUNT)

# A virtual environment on top of $(VENV): it finds the packages of both, first its own.
ON_TOP = import pathlib, sys, sysconfig; own = sysconfig.get_path("purelib"); \
	base = own.replace(sys.prefix, "$(abspath $(VENV))"); \
	pathlib.Path(own, "base.pth").write_text(f"import site; site.addsitedir({base!r})")
DEEPSPEED_NEEDS = einops hjson msgpack ninja py-cpuinfo
.venv-deepspeed/.done: $(VENV)/.dev
	$(BIN)/python -m venv --clear --without-pip .venv-deepspeed
	.venv-deepspeed/bin/python -c '$(ON_TOP)'
	DS_BUILD_OPS=0 $(BIN)/python -m pip --python .venv-deepspeed/bin/python install -q --no-compile --no-deps \
		--no-build-isolation -c constraints.txt deepspeed==0.19.8 $(DEEPSPEED_NEEDS)
	touch $@

test-deepspeed: .venv-deepspeed/.done  ## ZeRO-2 and ZeRO-3 on two CPU processes, in an environment of their own
	DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR=$(CURDIR)/.venv-deepspeed/extensions \
	.venv-deepspeed/bin/python -m pytest -m "" tests/test_train_deepspeed.py

gpu-report: $(VENV)/.dev  ## gpu-report.md: what only a GPU can measure, within nine minutes on a machine with one
	$(BIN)/python perf/gpu_report.py gpu-report.md

release: wheel  ## packages in dist/, checked, and the notes of the version in dist/notes.md
	$(BIN)/python -m build --sdist --no-isolation
	$(BIN)/python -m twine check --strict dist/*.whl dist/*.tar.gz
	$(BIN)/python scripts/release.py dist dist/notes.md

$(VENV)/.docs: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	touch $@

docs: $(VENV)/.docs  ## the documentation, in build/docs; broken links and missing references fail
	$(BIN)/sphinx-build --fail-on-warning --keep-going --nitpicky -c docs . build/docs

notebooks: $(VENV)/.dev  ## every notebook, executed on the miniature
	$(BIN)/python -m pytest -m "" tests/test_notebooks.py

audit:  ## known vulnerabilities of the versions in constraints.txt; skipped without network
	$(PYTHON) -m venv .venv-audit
	@if .venv-audit/bin/python -m pip install -q --upgrade pip-audit; \
	then .venv-audit/bin/pip-audit --disable-pip --no-deps -r constraints.txt -f json --progress-spinner off \
	| $(PYTHON) scripts/audit.py; \
	else echo "Skipped: pip-audit cannot be installed without network."; fi

wheel: $(VENV)/.dev  ## dist/*.whl; two builds of a commit are equal
	rm -rf build/lib  # of an earlier build, which may have modules that no longer exist
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(BIN)/python -m build --wheel --no-isolation

.venv-vllm/.done: $(VENV)/.dev constraints-vllm.txt
	$(BIN)/python -m venv --clear --without-pip .venv-vllm
	.venv-vllm/bin/python -c '$(ON_TOP)'
	$(BIN)/python -m pip --python .venv-vllm/bin/python install -q --no-compile --no-deps -r constraints-vllm.txt
	touch $@

test-vllm: .venv-vllm/.done  ## the vLLM plugin on a CPU, in an environment of its own
	.venv-vllm/bin/python -m pytest -m "" --durations 5 tests/test_vllm.py tests/test_vllm_server.py

LMMS_NEEDS = DataProperty antlr4-python3-runtime chardet colorama latex2sympy2_extended loguru lxml math-verify \
	mbstrdecoder pathvalidate portalocker pytablewriter sacrebleu tabledata tabulate tcolorpy tenacity typepy
.venv-lmms/.done: $(VENV)/.dev
	$(BIN)/python -m venv --clear --without-pip .venv-lmms
	.venv-lmms/bin/python -c '$(ON_TOP)'
	$(BIN)/python -m pip --python .venv-lmms/bin/python install -q --no-compile --no-deps -c constraints.txt \
		lmms-eval==0.7.3 $(LMMS_NEEDS)  # lmms-eval asks for 40 more packages
	touch $@

test-lmms: .venv-lmms/.done  ## lmms-eval's command line on a local task, in an environment of its own
	.venv-lmms/bin/python -m pytest -m "" tests/test_lmms_eval.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .venv-oldest .venv-audit .venv-deepspeed .venv-lmms .venv-vllm build dist *.egg-info demo-scene.png
