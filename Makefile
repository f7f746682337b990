# make demo             trains a LoRA on a tiny model and shows what comes out
# make demo KIND=i2v    the same for image-to-video
# make test             ruff and the test suite, by JOBS processes (often one of them waits: 3 suit 2 cores)
# make test-slow        with the tests that take minutes
# make clean            removes the virtual environment and the demo's files

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := .demo
KIND ?= t2v
JOBS ?= 3
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-slow clean
.DEFAULT_GOAL := test

# uv installs the 6 GB of requirements several times faster than pip, and shares them between environments.
$(VENV)/.installed: requirements.txt requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements-dev.txt
	touch $@

test: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n $(JOBS) $(PYTEST_ARGS)

test-slow: PYTEST_ARGS += --slow
test-slow: test

demo: $(VENV)/.installed
	rm -rf $(DEMO)
	$(BIN)/python tests/tiny.py $(DEMO) --kind $(KIND)
	DEMO=$(DEMO) KIND=$(KIND) PATH="$(CURDIR)/$(BIN):$$PATH" bash tools/demo.sh
	$(BIN)/python tools/show_run.py $(DEMO)/output

clean:
	rm -rf $(VENV) $(DEMO)
