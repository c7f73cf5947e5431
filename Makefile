# Every target makes .venv itself. PYTHON=python3.12 chooses the interpreter, once.
PYTHON ?= python3
STEPS ?= 60
BIN := .venv/bin

.PHONY: demo sweep test sanitize bench lint

# The whole method on real input, to runs/demo-60/report; STEPS=200 for a longer run.
demo: .venv/installed
	$(BIN)/python -m llamapro.demo --steps $(STEPS) --out runs/demo-$(STEPS)

# Measure the learning rates the demo uses, and record them.
sweep: .venv/installed
	$(BIN)/python -m llamapro.demo --sweep --steps $(STEPS) --out runs/sweep-$(STEPS)

# Everything; the builds for lesser CPUs than this one, and the compiled ops with fewer and more
# threads than cores; all without compiled ops; the Triton kernels in their interpreter (on a GPU the
# first line runs them).
test: .venv/installed
	$(BIN)/python -m pytest tests
	for set in $$($(BIN)/python -c "from llamapro_kernels import cpu; print(*cpu.runnable_builds()[1:])"); do LLAMAPRO_CPU_CAPABILITY=$$set $(BIN)/python -m pytest -q tests/test_ops.py tests/test_cpp.py -k cpp || exit; done
	for n in 1 5; do OMP_NUM_THREADS=$$n $(BIN)/python -m pytest -q tests/test_ops.py tests/test_cpp.py -k cpp || exit; done
	LLAMAPRO_NO_EXTENSION=1 $(BIN)/python -m pytest -q tests/test_ops.py tests/test_library.py tests/test_model.py tests/test_peers.py
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q tests/test_ops.py tests/test_triton.py tests/test_peers.py -k "not reference and not cpp"

# The compiled ops, built with the address and undefined-behaviour sanitizers, on their tests.
sanitize: .venv/installed
	LLAMAPRO_SANITIZE=1 $(BIN)/python setup.py -q build --build-base build/sanitize --build-lib build/sanitize/lib
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
		$(BIN)/python -m pytest -q -o pythonpath=build/sanitize/lib tests/test_ops.py tests/test_cpp.py -k "cpp and not compile"

bench: .venv/installed
	$(BIN)/python -m pytest benchmarks --benchmark-only

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# torch comes first, because the compiled ops are built against it.
.venv/installed: pyproject.toml constraints.txt setup.py $(wildcard csrc/*)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1" "setuptools>=77"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch numpy
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[train,demo,dev]"
	touch $@
