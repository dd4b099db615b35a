# One environment in .venv, made when it is needed. PYTHON=python3.12 chooses another interpreter.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt

# Tests share the cores with each other: a thread that waits must sleep. Elsewhere it must not, which halves the speed.
test test-all check hf-suite: export OMP_WAIT_POLICY ?= PASSIVE

# Without byte code each of the many processes that the tests start compiles torch and transformers for itself: 20 s of
# a start, not 7.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-all hf-suite check gpu gpu-smoke clean

demo: .venv/.installed
	$(BIN)/byrote demo

# A file of tests stays with one process: what it sets up for the whole file is set up once.
PYTEST = $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

# They are in the source distribution alone, which goes into .cache.
HF_SUITE = $(BIN)/python -m tests.hf_suite.source

test: .venv/.installed-dev
	$(PYTEST)

test-all: .venv/.installed-dev
	$(PYTEST) -m ""

# transformers' own tests of models, over ours, and over its DeepseekV3 for comparison.
hf-suite: .venv/.installed-dev
	$(HF_SUITE)
	$(PYTEST) -m "" tests/hf_suite

check: .venv/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST)

# With the interpreter's own packages, PYTHON=python3, since a GPU machine may not be able to install any. First the
# exactness suite and the kernels, then the benchmarks in bfloat16, then three seeds of MoE against Engram, and of
# concepts against a plain model, at the size of one GPU.
# A dry run on a CPU: make gpu DEVICE=cpu QUICK=1
DEVICE ?= cuda
OUT ?= runs/gpu
RUN = PYTHONPATH=. $(PYTHON)
MEASURE = --device $(DEVICE) --dtype bfloat16 $(if $(QUICK),--quick)

# What a card must show first: at most six minutes. A dry run on a CPU: make gpu-smoke DEVICE=cpu QUICK=1
gpu-smoke:
	$(RUN) benchmarks/gpu_smoke.py --device $(DEVICE) --out $(OUT)-smoke $(if $(QUICK),--quick)

gpu:
	$(RUN) -m pytest tests/exactness tests/tables/test_triton.py tests/tables/test_device.py tests/tables/test_pinned.py
	mkdir -p $(OUT)
	for shape in small tiny wide; do for compile in "" --compile; do \
	    $(RUN) benchmarks/training.py $(MEASURE) --shape $$shape $$compile --json $(OUT)/training-$$shape$$compile.json \
	        || exit 1; done; done
	for shape in small tiny wide; do \
	    $(RUN) benchmarks/decode.py $(MEASURE) --shape $$shape --json $(OUT)/decode-$$shape.json || exit 1; done
	for billions in 32 64; do \
	    $(RUN) benchmarks/pinned.py $(MEASURE) --billions $$billions --profile --json $(OUT)/pinned-$$billions.json \
	        || exit 1; done
	$(RUN) benchmarks/small.py --device $(DEVICE) $(if $(QUICK),--quick) --out $(OUT)/small
	for shape in tiny small; do \
	    $(RUN) benchmarks/dlcm.py $(MEASURE) --shape $$shape --json $(OUT)/dlcm-$$shape.json || exit 1; done
	$(RUN) benchmarks/concepts.py --shape $(if $(QUICK),tiny --quick --seeds 1,small) --device $(DEVICE) --jobs 1 \
	    --out $(OUT)/concepts

clean:
	rm -rf .venv .cache .pytest_cache .mypy_cache .ruff_cache runs data *.egg-info

.venv/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "byrote needs Python 3.11 or newer, and $(PYTHON) is not; try: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	touch $@

.venv/.installed: pyproject.toml constraints.txt | .venv/.made
	$(INSTALL) -e .
	touch $@

.venv/.installed-dev: pyproject.toml constraints.txt | .venv/.made
	$(INSTALL) -e '.[dev]'
	@$(HF_SUITE) >/dev/null || echo "without transformers' own tests, which are skipped: make hf-suite tries again"
	touch $@ .venv/.installed
