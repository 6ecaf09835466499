# The demonstration, the tests and the benchmarks, each in a virtual environment made on first use.

VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

# Python 3.11 by name, or whatever newer one python3 is. Set PYTHON=... for another.
PYTHON ?= $(shell command -v python3.11 >/dev/null && python3.11 --version >/dev/null 2>&1 && echo python3.11 || echo python3)

# Each set-up leaves a stamp, and is repeated only when what it installs has changed.
DEMO := $(VENV)/.installed-demo
TEST := $(VENV)/.installed-test
HOROVOD := $(VENV)/.installed-horovod
TPU := $(VENV)/.installed-tpu

.PHONY: help demo test nightly lint clean distclean
BENCHMARKS := benchmark-update-cost benchmark-row-cost benchmark-thor-convergence benchmark-row-convergence \
  benchmark-gradient-error benchmark-communication benchmark-replicas benchmark-tpu
.PHONY: $(BENCHMARKS) benchmark

help:
	@echo "make demo                   EigenAdam beside Adam and Muon on images of MNIST, offline"
	@echo "make test                   lint, then the tests on the TensorFlow and on the JAX backend"
	@echo "make nightly                all networks of keras.applications, and on TensorFlow what make test runs on JAX alone; takes long"
	@echo "make lint                   ruff: rules and format; mypy: types"
	@echo "make benchmark              side by side: costs of steps, convergence, kfac-jax; an hour, goes on where interrupted"
	@echo "make benchmark-update-cost  what THOR's blocks save of a refresh"
	@echo "make benchmark-thor-convergence  what steps of KFAC and THOR are worth with the papers' settings"
	@echo "make benchmark-row-cost     what an update of HyLo costs against one of KFAC"
	@echo "make benchmark-row-convergence  what steps of SKFAC and HyLo are worth"
	@echo "make benchmark-gradient-error   how far HyLo's rows are from the whole batch"
	@echo "make benchmark-communication    what workers receive; needs Horovod"
	@echo "make benchmark-replicas     whether replicas of a strategy should share out inversions"
	@echo "make benchmark-tpu          what steps take of the chips of a TPU, compiled without one; installs libtpu, takes hours"
	@echo "make clean                  remove caches and build outputs (distclean: $(VENV), too)"

demo: $(DEMO)
	$(BIN)/python examples/quickstart.py

# Tests that say the same on both backends run on JAX, where they take half the time; by night on TensorFlow, too.
# Workers get whole files: runs that several tests of one file look at take minutes. In the order of their names: a file of a
# few long tests would else be among the last, and one worker wait for it.
test: lint $(HOROVOD)
	KERAS_BACKEND=tensorflow $(BIN)/pytest --once -m "not processes" -n $(JOBS) --dist=loadfile --no-loadscope-reorder --durations=12
	KERAS_BACKEND=tensorflow $(BIN)/pytest -m processes --durations=12
	KERAS_BACKEND=jax $(BIN)/pytest -m "" -n $(JOBS) --dist=loadfile --no-loadscope-reorder --durations=12

# One after the other: the largest takes 11 GB, and 15 where what it has let go of is not given back at once, which glibc is told to
# do here. On TensorFlow alone: XLA needs minutes for some.
nightly: $(TEST)
	MALLOC_MMAP_THRESHOLD_=1000000 KERAS_BACKEND=tensorflow $(BIN)/pytest -m nightly --durations=12
	KERAS_BACKEND=tensorflow $(BIN)/pytest -m "neutral and not nightly" -n $(JOBS) --dist=loadfile --durations=12

lint: $(TEST)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

$(BENCHMARKS): $(TEST)
	$(BIN)/python -m benchmarks.$(subst -,_,$(@:benchmark-%=%))

benchmark: $(TEST)
	$(BIN)/python -m benchmarks

benchmark-tpu: $(TPU)

clean:
	rm -rf build dist keras_ngd.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find keras_ngd tf_tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "keras_ngd needs Python 3.11 or newer, but $(PYTHON) is not. Name one: make ... PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(DEMO): setup.py pyproject.toml constraints.txt | $(BIN)/pip
	$(INSTALL) --editable ".[tensorflow,datasets,plots]"
	@touch $@

$(TEST): setup.py pyproject.toml constraints.txt | $(DEMO)
	$(INSTALL) --editable ".[test]"
	@touch $@

$(TPU): setup.py pyproject.toml constraints.txt | $(TEST)
	$(INSTALL) --editable ".[tpu]"
	@touch $@

$(HOROVOD): horovod_scripts/install_horovod.sh | $(TEST)
	horovod_scripts/install_horovod.sh --python $(BIN)/python
	@touch $@
