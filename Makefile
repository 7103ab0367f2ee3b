# One command per wish. `make install` works on a machine with nothing but Python >= 3.11 and a package index.
#
#   make install      .venv with torch by its exact pin, then this project in editable mode under constraints.txt
#   make quickstart   a real 2-process packed fine-tune with answers before and after, into runs/quickstart
#   make check        format, lint, types, import contracts, shell scripts, known holes of dependencies
#   make test         the default suite        make test-fast   without the tests that start processes
#   make faults       the long suite: 200 kills over the whole matrix, every system call and signal, all ways of launching
#   make soak         random faults for an hour (SOAK_MINUTES=60), then a comparison of all bits
#   make test-gpu     tests and measurements that need one CUDA device
#   make clean        remove caches and builds (keeps .venv and runs/)
#
# Another interpreter: make install PYTHON=python3.12
# Another torch build: make install TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
TORCH_INDEX ?=
SOAK_MINUTES ?= 60
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed.stamp
TORCH := $(shell sed -n '/^torch==/p' constraints.txt)
SCRIPTS := $(wildcard launch/*.sh slurm/*) .ci/run

.PHONY: install quickstart check test test-fast faults soak test-gpu clean
.DELETE_ON_ERROR:

install: $(STAMP)

# Repeated only when what is to be installed changes; an interrupted install leaves no stamp and starts again.
$(STAMP): setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is missing or older than 3.11: install one and name it, e.g. make install PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) cannot create virtual environments: apt-get install python3-venv" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@echo "Installing $(TORCH) and the project under constraints.txt: a few minutes, about 3 GB on a machine without CUDA"
	$(BIN)/python -m pip install --quiet $(TORCH) -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	$(BIN)/python -m pip install --quiet --editable '.[dev]' -c constraints.txt
	@touch $@

quickstart: $(STAMP)
	$(BIN)/sft-dist quickstart

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/shellcheck -x $(SCRIPTS)
	$(BIN)/python .ci/audit.py

# Tests inside one process run side by side, one thread each; those that start processes run one after another.
test: test-fast
	$(BIN)/python -m pytest -m "slow and not gpu and not faults"

test-fast: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu and not slow and not faults" -n 2

faults: $(STAMP)
	$(BIN)/python -m pytest tests/faults -m "not gpu"
	$(BIN)/python -m pytest tests/slurm tests/distributed tests/e2e -m "faults and not gpu"

soak: $(STAMP)
	PYTHONPATH=.:kernels:tests:tests/faults $(BIN)/python tests/faults/soak.py runs/soak --minutes $(SOAK_MINUTES)

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu || test $$? -eq 5  # 5: no test selected
	$(BIN)/python benchmarks/gpu_check.py

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
