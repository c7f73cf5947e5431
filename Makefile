# Every target makes .venv itself. PYTHON=python3.12 chooses the interpreter, once.
PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
# Tests run side by side, with one thread each; a worker gets one at a time, in conftest.py's order.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist load --maxschedchunk=1
# Left out: fp64, which no compiled op serves; graphs, which hold whole ops, whatever serves them;
# what an import costs and registers.
BY_EXTENSION := not composition and not transformers and not compile and not inductor and not import

.PHONY: demo sweep keep trace paper test wheel sanitize bench lint

# The whole method on real input, to runs/demo/report; STEPS=200 makes it longer, in runs/demo-200.
demo: .venv/installed
	PYTHONPATH=python $(BIN)/python -m recipes.demo $(STEPS:%=--steps %) --out runs/demo$(STEPS:%=-%)

# Measure the learning rates the demo uses, and record them.
sweep: .venv/installed
	PYTHONPATH=python $(BIN)/python -m recipes.demo --sweep $(STEPS:%=--steps %) --out runs/sweep$(STEPS:%=-%)

# What keeps a base, hours on a CPU; DATA names the folder with models/stories260K and text/legal.
keep: .venv/installed
	PYTHONPATH=python $(BIN)/python -m recipes.keep --data-root $(DATA)

# TRACE's tasks, learnt one after the other, to runs/trace; DATA names the folder with trace/TASK,
# MODEL the base (SmolLM2-135M by default), ARGS more options: ARGS="--tasks FOMC NumGLUE-cm".
trace: .venv/installed
	PYTHONPATH=python $(BIN)/python -m recipes.trace --data-root $(DATA) $(MODEL:%=--model %) $(ARGS)

# Expansion beside its rivals, to runs/paper/SCALE/report; SCALE is smoke, tiny, cpu, gpu or llama2-7b,
# DATA the folder with models/ and text/ where the scale needs one, ARGS more options.
SCALE ?= smoke
paper: .venv/installed
	PYTHONPATH=python $(BIN)/python -m recipes.paper $(SCALE) $(DATA:%=--data-root %) $(ARGS)

# Style; everything; the builds for lesser CPUs than this one; what runs without compiled ops; the
# Triton kernels in their interpreter (on a GPU the first line runs them); the wheel; the sanitizers.
test: lint
	$(TEST) tests
	for set in $$($(BIN)/python -c "from llamapro_kernels import cpu; print(*cpu.runnable_builds()[1:])"); do LLAMAPRO_CPU_CAPABILITY=$$set $(TEST) tests/test_ops.py tests/test_inputs.py tests/test_cpp.py tests/test_extremes.py tests/test_quantize.py tests/test_linear_kl_divergence.py -k "cpp and not compile" || exit; done
	LLAMAPRO_NO_EXTENSION=1 $(TEST) tests/test_library.py tests/test_block.py tests/test_model.py tests/test_peers.py -k "$(BY_EXTENSION)"
	TRITON_INTERPRET=1 $(TEST) tests/test_ops.py tests/test_inputs.py tests/test_triton.py tests/test_quantize.py tests/test_extremes.py tests/test_peers.py tests/test_linear_kl_divergence.py -k "not reference and not cpp and not compile"
	$(MAKE) --jobs=2 --output-sync=line wheel sanitize

# A wheel, in an environment that has nothing else, runs the README's example.
wheel: .venv/installed
	rm -rf build/wheel build/empty
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheel .
	$(PYTHON) -m venv build/empty
	build/empty/bin/python -m pip install --quiet --no-compile --constraint constraints.txt "$$(echo build/wheel/*.whl)[train]"
	cd build/empty && bin/python ../../tests/try_wheel.py

# The compiled ops of this CPU, built with the address and undefined-behaviour sanitizers, on their tests.
# Its egg-info is its own: the wheel may be built at the same time.
sanitize: .venv/installed
	mkdir -p build/sanitize
	LLAMAPRO_SANITIZE=$$($(BIN)/python -c "from llamapro_kernels import cpu; print(cpu.BUILD)") \
		$(BIN)/python setup.py -q egg_info --egg-base build/sanitize \
		build --build-base build/sanitize --build-lib build/sanitize/lib
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
		$(TEST) -o pythonpath=build/sanitize/lib tests/test_ops.py tests/test_inputs.py tests/test_cpp.py tests/test_extremes.py tests/test_quantize.py -k "cpp and not compile and not instructions"

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
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[train,data,eval,demo,dev]"
	touch $@
