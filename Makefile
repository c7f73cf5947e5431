# Every target makes .venv itself. PYTHON=python3.12 chooses the interpreter, once.
PYTHON ?= python3
STEPS ?= 60
BIN := .venv/bin

.PHONY: demo sweep test bench lint

# The whole method on real input, to runs/demo-60/report; STEPS=200 for a longer run.
demo: .venv/installed
	$(BIN)/python -m llamapro.demo --steps $(STEPS) --out runs/demo-$(STEPS)

# Measure the learning rates the demo uses, and record them.
sweep: .venv/installed
	$(BIN)/python -m llamapro.demo --sweep --steps $(STEPS) --out runs/sweep-$(STEPS)

# The second line runs the Triton kernels in their interpreter; on a GPU the first one runs them.
test: .venv/installed
	$(BIN)/python -m pytest tests
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/test_ops.py tests/test_triton.py tests/test_peers.py -k "not reference"

bench: .venv/installed
	$(BIN)/python -m pytest benchmarks --benchmark-only

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[train,demo,dev]"
	touch $@
