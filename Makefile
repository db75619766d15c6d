# `make` alone lists the targets. Needed: make and Python 3.11 or later; everything else goes into $(VENV).
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
PYTEST_WORKERS ?= 2
PIP_ARGS ?=
# The first interpreter that is new enough and can make a virtual environment, unless one is given: make PYTHON=...
PYTHON ?= $(shell for python in python3 python3.11 python3.12 python3.13 python3.14 python; do \
    $$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 \
    && echo $$python && break; done)

# Threads that wait leave their core to others soon; the commands say so themselves (lckv/utils/processes.py).
export GOMP_SPINCOUNT ?= 1000
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: help setup train compare study test test-slow test-gpu test-hub test-serving check notebooks docs docs-serve format wheel wheel-smoke bench bench-decode bench-prefill bench-serving clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP) ## make the virtual environment and install all that the tests need

$(STAMP): pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then \
	    echo "make: no Python 3.11 or later with venv and ensurepip was found; install one (on Debian and Ubuntu also" \
	        "python3-venv) or name it: make setup PYTHON=/path/to/python3.11" >&2; exit 2; fi
	@"$(PYTHON)" -c 'import sys; sys.version_info >= (3, 11) or sys.exit("make: Python 3.11 or later is needed, but \
$(PYTHON) is %s; name another: make setup PYTHON=/path/to/python3.11" % sys.version.split()[0])'
	@echo "==> making $(VENV) with $$("$(PYTHON)" --version) and installing into it; the first time takes some minutes"
	"$(PYTHON)" -m venv "$(VENV)"
	"$(RUN)" -m pip install --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e ".[dev]"
	@touch "$@"
	@echo "==> $(VENV) is ready. Next: make train, or make test"

train: $(STAMP) ## train the demo, a small LCKV model, on the CPU (about 5 minutes)
	$(RUN) -m lckv.train experiment=demo_lckv

compare: $(STAMP) ## train the demo as Llama and as LCKV and put them side by side (about 7 minutes)
	$(RUN) -m lckv.train experiment=demo_llama
	$(RUN) -m lckv.train experiment=demo_lckv
	$(RUN) scripts/compare.py runs/demo_llama runs/demo_lckv

STUDY_JOBS ?= 2
STUDY_SEEDS ?= 0
STUDY_ARGS ?=
STUDY := -m lckv.train -m experiment=study run_dir=runs/study hydra/launcher=local hydra.launcher.n_jobs=$(STUDY_JOBS)
NINE := pizza_bottom,pizza_top,pizza_middle,sandwich_bottom,sandwich_top,sandwich_middle,lasagna_bottom,lasagna_top,lasagna_middle

# Llama has two seeds, so that one sees how far apart equal models end. A run that fails stops no other: what failed and
# why is in the report, and in the exit code.
study: $(STAMP) ## compare Llama and ten patterns at two KV budgets on the embedded text (about an hour)
	@status=0; \
	"$(RUN)" $(STUDY) sharing=llama seed=0,1 $(STUDY_ARGS) || status=$$?; \
	"$(RUN)" $(STUDY) sharing=$(NINE) sharing.num_kv_layers=6,3 seed=$(STUDY_SEEDS) $(STUDY_ARGS) || status=$$?; \
	"$(RUN)" $(STUDY) sharing=fusedkv_lite sharing.num_self_layers=6,3 seed=$(STUDY_SEEDS) $(STUDY_ARGS) || status=$$?; \
	"$(RUN)" -m lckv.report runs/study || status=$$?; \
	exit $$status

test: $(STAMP) ## run the tests, without the slow ones and those that need a GPU (about 7 minutes)
	$(RUN) -m pytest -n $(PYTEST_WORKERS) --dist loadfile --no-loadscope-reorder --durations=15

test-slow: $(STAMP) ## run the slow tests
	$(RUN) -m pytest -n $(PYTEST_WORKERS) --dist loadfile -m slow --timeout=900 --durations=15

test-gpu: $(STAMP) ## run the tests that need an accelerator
	$(RUN) -m pytest -m gpu --timeout=300 --durations=15

ALONE := $(CURDIR)/.cache/alone

test-hub: $(STAMP) ## load exported models with transformers alone, old and new (about 14 minutes, mostly pip)
	@for version in '>=5.17,<5.18' '>=5.18,<5.19' '<6'; do \
	    echo "==> transformers$$version and torch, in an environment without lckv"; \
	    "$(PYTHON)" -m venv --clear "$(ALONE)"; \
	    "$(ALONE)/bin/python" -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) "transformers$$version" torch; \
	    LCKV_ALONE_PYTHON="$(ALONE)/bin/python" "$(RUN)" -m pytest -q -n 0 -rs tests/unit/exporting/test_hub_alone.py; \
	done

SERVING_VENV ?= .venv-vllm
test-serving: ## run the tests that serve models with vLLM, in an environment of their own (about 6 minutes, the first time 11)
	VLLM_VENV="$(SERVING_VENV)" PYTHON="$(PYTHON)" scripts/serve_vllm.sh --install-only
	"$(SERVING_VENV)/bin/python" -m pip install --quiet --disable-pip-version-check pytest pytest-timeout
	"$(SERVING_VENV)/bin/python" -m pytest --confcutdir=tests/serving -m serving --timeout=600 --durations=10 tests/serving

# Notebooks are kept with what they print and draw, and without the rest that an editor adds.
KEEP := --keep-output --keep-count --keep-id

check: $(STAMP) ## lint, formatting, types, spelling, notebooks without traces of a machine, links of the site
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -m codespell_lib
	$(RUN) -m nbstripout --verify $(KEEP) notebooks/*.ipynb
	$(SITE) build --strict

# The theme would tell of another program by which mkdocs may be replaced one day.
SITE := NO_MKDOCS_2_WARNING=1 "$(RUN)" -m mkdocs

docs: $(STAMP) ## build the site into site/; what does not lead anywhere is an error
	$(SITE) build --strict
	@echo "==> site/index.html"

docs-serve: $(STAMP) ## show the site at http://localhost:8000, and what is changed in it
	$(SITE) serve

notebooks: $(STAMP) ## execute the notebooks in place, with new outputs and pictures (about 10 minutes)
	$(RUN) scripts/notebooks.py notebooks/*.ipynb

format: $(STAMP) ## format the code and strip the notebooks
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(RUN) -m nbstripout $(KEEP) notebooks/*.ipynb

wheel: $(STAMP) ## build the wheel and the source archive into dist/
	$(RUN) -m build --no-isolation --outdir dist .

wheel-smoke: $(STAMP) ## build the wheel and train from it in an empty folder
	$(RUN) -m pytest tests/e2e/test_wheel.py

bench: $(STAMP) ## measure training steps against transformers' Llama
	$(RUN) scripts/bench.py

bench-decode: $(STAMP) ## measure decoding of five families in one KV budget, into runs/
	$(RUN) -m lckv.benchmark suite=decode

bench-prefill: $(STAMP) ## measure the prefill of 2,048 tokens, into runs/
	$(RUN) -m lckv.benchmark suite=prefill

bench-serving: ## measure what shared keys and values are worth in vLLM, into runs/ (about 10 minutes)
	VLLM_VENV="$(SERVING_VENV)" PYTHON="$(PYTHON)" scripts/serve_vllm.sh --install-only
	"$(SERVING_VENV)/bin/python" -m pip install --quiet --disable-pip-version-check matplotlib hydra-core
	"$(SERVING_VENV)/bin/python" scripts/bench_serving.py --output runs/serving.json --picture runs/serving.png

clean: ## remove what is built and cached, not .venv and not runs/
	rm -rf build dist site .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find lckv tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
