# The Python that makes .venv: `make demo PYTHON=python3.12`.
PYTHON ?= python3

# An active environment that already has torch is used as it is; otherwise .venv.
# Overridable: `make demo ENV_DIR=/usr/local` uses the Python of a container.
ACTIVE := $(or $(VIRTUAL_ENV),$(CONDA_PREFIX))
HAS_TORCH = "$(ACTIVE)/bin/python" -c 'import importlib.util as u; exit(not u.find_spec("torch"))'
ENV_DIR := $(or $(if $(ACTIVE),$(shell $(HAS_TORCH) 2>/dev/null && echo "$(ACTIVE)")),.venv)
PY := "$(ENV_DIR)/bin/python"

.DEFAULT_GOAL := help
.PHONY: help install install-tests demo zoo-check test test-fast soak gpu-test lint docs clean

help:
	@echo "make demo       train, evaluate and draw on the generated data set"
	@echo "make test       every check and test (no GPU needed)"
	@echo "make test-fast  the tests that take seconds"
	@echo "make zoo-check  trains small recipes on the generated data, each up to its bar"
	@echo "make soak       kills trainings 200 times, and runs one for long: about an hour"
	@echo "make gpu-test   on a GPU: kernels, compilers, a step of each model"
	@echo "make lint       ruff and mypy"
	@echo "make docs       the documentation as a site, in output/site"
	@echo "make install    only the installation, into $(ENV_DIR); the others do it themselves"
	@echo "make clean      remove caches and build files; keeps .venv, data and output"

# Installs nothing if the environment is complete.
install-tests: EXTRAS = --tests

install install-tests:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "Python 3.10 or newer is needed; '$(PYTHON)' is older or missing." \
	       "Name another: make $(or $(firstword $(MAKECMDGOALS)),demo) PYTHON=python3.12" >&2; \
	  exit 1; }
	@$(PYTHON) tools/bootstrap.py "$(ENV_DIR)" $(EXTRAS)

demo: install
	@$(PY) tools/run_demo.py

# Ten CPU minutes a recipe; ONLY=panoptic runs those with that in the name.
zoo-check: export OMP_NUM_THREADS = 1

zoo-check: install
	@$(PY) datasets/make_shapes.py
	@$(PY) tools/check_zoo.py --only "$(ONLY)"

lint: install-tests
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# Processes that share cores are several times slower with more threads than cores.
test test-fast: export OMP_NUM_THREADS = 1

test: lint
	$(PY) -m pytest -n 2 --dist worksteal

test-fast: install-tests
	$(PY) -m pytest -n 2 --dist worksteal -m "not slow"

soak: export OMP_NUM_THREADS = 1

soak: export SOAK = 1

soak: install-tests
	SOAK_KILLS=100 $(PY) -m pytest -n 2 -rP -k "killed_and_resumed or random_kills"
	$(PY) -m pytest -rP -m soak

gpu-test: install-tests
	$(PY) -m pytest -m gpu tests/ops

docs: install
	@$(PY) -m pip install --quiet --editable ".[docs]"
	$(PY) -m zensical build --strict

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path "./.venv/*" -prune -exec rm -rf {} +
