# make demo             trains a LoRA of a tiny model and writes a page about it
# make demo KIND=i2v    the same for image-to-video
# make smoke            tries both scripts from end to end with tiny models, in under a minute
# make test             runs ruff and the test suite, in JOBS processes (one a core)
# make test-slow        runs the tests that take minutes, too
# make clean            removes the virtual environment and the demo's files

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := .demo
KIND ?= t2v
JOBS ?= 2
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
# Without bytecode files each start of a script takes 30 s in place of 14.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo smoke test test-slow clean
.DEFAULT_GOAL := test

# uv installs the 6 GB of requirements several times faster than pip, and shares the files between environments.
$(VENV)/.installed: requirements.txt requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements-dev.txt
	touch $@

test: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup $(PYTEST_ARGS)

test-slow: PYTEST_ARGS += --slow
test-slow: test

# One thread. OpenMP threads wait for each other in busy loops: with two of them on two cores, a step takes 20 % less
# time, but 7 to 19 times as long when another process uses one core. nproc, in demo/demo.sh, prints OMP_NUM_THREADS.
demo: export OMP_NUM_THREADS := 1
demo: $(VENV)/.installed
	rm -rf $(DEMO)
	$(BIN)/python demo/tiny.py $(DEMO) --kind $(KIND)
	DEMO=$(DEMO) KIND=$(KIND) PATH="$(CURDIR)/$(BIN):$$PATH" bash demo/demo.sh
	$(BIN)/python tools/report.py $(DEMO)/smiley

smoke: $(VENV)/.installed
	$(BIN)/python demo/smoke.py .smoke
	rm -rf .smoke

clean:
	rm -rf $(VENV) $(DEMO) .smoke
