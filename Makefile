# make demo: set up, then the four-stage curriculum on the synthetic demo dataset
# make test: set up, then the tests (fast suite first, then the ones that start a real Ray cluster)
# make test-fast: the tests without a cluster; make test-cluster: those with one
# make test-slow: tests of minutes each: learning, a soak, a cluster that changes size, a sweep
# make test-lowest: the fast tests with the lowest versions that pyproject.toml allows, in .venv-lowest
# make lint: ruff, mypy and the import contracts; make docs: the documentation as a site in site/
# make bench: every speed claim beside its baseline, into docs/performance.md; make bench ONLY=tracker: one of them
# make setup: the environment alone; make wheel: the package in dist/; make clean: remove outputs and caches
# make lock: regenerate the lock files, pins kept where possible; make lock UPGRADE=1: with the newest versions
# The first supported interpreter of the machine is used as it is: 3.11 to 3.14. make PYTHON=python3.13 names another.
SUPPORTED := (3, 11) <= sys.version_info[:2] <= (3, 14)
PYTHON ?= $(shell for each in python3.12 python3 python3.11 python3.13 python3.14; do \
	$$each -c 'import sys; sys.exit(not $(SUPPORTED))' 2>/dev/null && echo $$each && exit; done; echo python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
STORAGE ?= $(CURDIR)/outputs/demo
# Two workers with one clip each compute the steps of one worker with two clips, on two cores in less time.
DEMO_WORKERS ?= --workers 1:2 --set BATCH_SIZE=1

export RAY_USAGE_STATS_ENABLED := 0
export MLFLOW_DISABLE_TELEMETRY := true

.PHONY: help setup demo test test-fast test-cluster test-slow test-lowest bench lint docs wheel lock clean

help:
	@grep -E '^# make' Makefile | sed 's/^# //'

setup: $(STAMP)

# The build tools are in the lock file, so installing the project itself fetches nothing.
$(STAMP): requirements.lock requirements-dev.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if $(SUPPORTED) else "Python 3.11 to 3.14 is needed, {} is {}.{}: run make PYTHON=python3.12".format(sys.executable, *sys.version_info[:2]))'
	@echo "setting up $(VENV) (a few minutes and about 7 GB the first time)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes --requirement requirements.lock --requirement requirements-dev.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
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

# Not locked: versions follow from the lower bounds of pyproject.toml.
test-lowest:
	test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet uv
	.venv-lowest/bin/uv pip install --quiet --python .venv-lowest --resolution lowest-direct --editable ".[aws,dev]"
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -n auto --maxprocesses 8 --dist loadfile

bench: setup
	$(BIN)/python -m benchmarks $(if $(ONLY),--only $(ONLY))

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The variable disables an announcement of the theme about other site generators.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

wheel: setup
	$(BIN)/python -m hatchling build --target wheel --directory dist

# Runtime, development and build requirements; the second contains the pins of the first.
# One version of each package for every supported Python.
COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --fork-strategy fewest --generate-hashes \
	--annotation-style line --custom-compile-command "make lock" $(if $(UPGRADE),--upgrade)
lock: setup
	$(COMPILE) pyproject.toml --extra aws --output-file requirements.lock
	$(COMPILE) pyproject.toml --extra aws --extra dev --extra docs --group build \
		--constraint requirements.lock --output-file requirements-dev.lock
	$(COMPILE) --group build --constraint requirements-dev.lock --output-file requirements-build.lock

clean:
	rm -rf outputs build dist site .venv-lowest .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
