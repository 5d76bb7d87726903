# `make run` draws a guided-against-unguided picture, `make test` runs the tests.
# Each works by itself in a fresh clone: it makes .venv with the pinned versions first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
RELEASE := .venv-release
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PICTURE := out/compare.png
# Loose prompts, where the builtin model is unsure: guidance shows there.
PROMPTS := "" happy face --seed 15 --sag-scales 0,2

export HF_HUB_OFFLINE := 1
# Waiting threads sleep: spinning slows small models tenfold where other programs run, too.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: run test notebook docs dist nightly lint support-table clean

run: $(VENV)/.run
	$(BIN)/sag compare $(PROMPTS) --out $(PICTURE) --overwrite

# A process for each core, with one thread: small networks gain nothing from more. A file's tests
# stay together, so that what they share is made once.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

# Tries 15,000 generated inputs; some minutes.
nightly: $(VENV)/.dev
	HYPOTHESIS_PROFILE=nightly OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto tests/test_hostile_input.py

# Runs the tests of pipelines with the oldest and the newest supported diffusers.
support-table: $(VENV)/.dev $(OLDEST)/.dev
	mkdir -p out
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto -m supports --support-report=out/newest.json
	-OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest --numprocesses auto -m supports -W default --support-report=out/oldest.json
	$(BIN)/python docs/support_table.py out/oldest.json out/newest.json docs/support.md

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-cache

# Runs the notebook and keeps its pictures in it.
notebook: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python notebooks/execute.py

# The documentation as a web site, out/site; every link must have its end.
docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Both packages of a release, in dist.
dist: $(VENV)/.made
	rm -rf dist
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/python -m pip install --quiet --disable-pip-version-check 'build>=1.2' 'twine>=6.0'
	$(RELEASE)/bin/python -m build
	$(RELEASE)/bin/twine check --strict dist/*

clean:
	rm -rf $(VENV) $(OLDEST) $(RELEASE) out build dist .pytest_cache .ruff_cache

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit("error: Python %d.%d must be 3.10 or newer; set PYTHON=" % sys.version_info[:2] if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.run: $(VENV)/.made pyproject.toml constraints.txt
	@echo "Installing torch, diffusers and transformers into $(VENV): some minutes, only once ..."
	$(PIP) --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.run pyproject.toml constraints.txt
	@echo "Installing the development tools ..."
	$(PIP) --editable '.[dev]'
	@touch $@

$(OLDEST)/.dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OLDEST)
	grep -vE '^(diffusers|transformers|huggingface_hub|tokenizers|gradio|gradio_client|hf-gradio)==' constraints.txt > $(OLDEST)/constraints.txt
	printf 'diffusers==0.36.0\ntransformers==4.57.6\n' >> $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(OLDEST)/constraints.txt --editable '.[dev]'
	@touch $@
