# make demo: set up, then the four-stage curriculum on the embedded demo world
# make test: set up, then the tests (fast suite first, then the ones that start a real Ray cluster)
PYTHON ?= $(shell command -v python3.12 >/dev/null 2>&1 && python3.12 -c "" 2>/dev/null && echo python3.12 || echo python3)
# make test-slow: what takes too long for every change: learning, a soak, a cluster that changes, a sweep
# make setup: the environment alone; make lint: ruff and mypy; make clean: remove what runs and tools left behind
# make bench: every speed claim beside its baseline, into docs/performance.md; make bench ONLY=tracker: one of them
# The interpreter of the machine is used as it is; 3.11 and 3.12 are supported.
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
STORAGE ?= $(CURDIR)/outputs/demo
# Two workers with one clip each learn what one worker with two clips does, on two cores in less time.
DEMO_WORKERS ?= --workers 1:2 --set BATCH_SIZE=1

export RAY_USAGE_STATS_ENABLED := 0
export MLFLOW_DISABLE_TELEMETRY := true

.PHONY: help setup demo test test-fast test-cluster test-slow bench lint clean

help:
	@grep -E '^# make' Makefile | sed 's/^# //'

setup: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 13) else f"Python 3.11 or 3.12 is needed, {sys.executable} is {v[0]}.{v[1]}: run make PYTHON=python3.12")'
	@echo "setting up $(VENV) (a few minutes and about 7 GB the first time)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	@$(BIN)/python -c 'from motip.errors import exit_on_error; c = exit_on_error(); c.__enter__(); exec("try:\n import cv2\nexcept ImportError as e:\n c.__exit__(type(e), e, e.__traceback__)")'
	@touch $(STAMP)

demo: setup
	$(BIN)/python ray_jobs/curriculum.py --config configs/demo/curriculum.yaml --storage $(STORAGE) $(DEMO_WORKERS)
	@$(BIN)/motip report open $(STORAGE)/curricula/demo

test: test-fast test-cluster

test-fast: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

test-cluster: setup
	$(BIN)/python -m pytest -m "cluster and not slow"

test-slow: setup
	$(BIN)/python -m pytest -m slow

bench: setup
	$(BIN)/python -m tests.benchmarks $(if $(ONLY),--only $(ONLY))

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf outputs build dist .pytest_cache .mypy_cache .ruff_cache
