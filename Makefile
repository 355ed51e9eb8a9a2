# From nothing but Python >= 3.11 and make:  `make serve` answers on port 8000, `make test` runs every test.
PYTHON ?= python3
VENV   ?= .venv
MODEL  ?= smollm2
PORT   ?= 8000
BIN    := $(VENV)/bin

.PHONY: serve test lint types wheel-test format clean

serve: $(VENV)/.serve
	$(BIN)/cadenza serve $(MODEL) --port $(PORT)

test: $(VENV)/.dev
	$(BIN)/pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The four folders are packages under names that only setuptools' mapping knows; links let mypy see them.
types: $(VENV)/.dev .typing/cadenza
	MYPYPATH=.typing $(BIN)/mypy --namespace-packages --explicit-package-bases .typing/cadenza/

.typing/cadenza:
	mkdir -p $@
	for package in server decoding models kernels; do ln -sfn ../../$$package $@/$$package; done

# The wheel that people install, in an environment of its own: nothing is missing from it, and it serves.
wheel-test: $(VENV)/.dev
	rm -rf dist $(VENV)-wheel
	$(BIN)/python -m build --wheel --outdir dist .
	$(PYTHON) -m venv $(VENV)-wheel
	$(VENV)-wheel/bin/pip install --quiet "$$(ls dist/*.whl)[test]"
	$(VENV)-wheel/bin/pytest tests/test_packaging.py $(addprefix tests/e2e/test_,process.py openai_client.py examples.py)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.serve: $(VENV)/bin/python pyproject.toml
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-wheel .typing dist build *.egg-info
