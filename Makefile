# make demo        the demo, in an environment that this file makes
# make test        the whole suite, likewise
# make bench-cpu   every model of the list against eager and torch.compile; results in benchmarks/results/
# make bench-training   the same, forward and backward
# make bench-gpu   generated kernels on a GPU beside their peers, in eight minutes; tables in benchmarks/README.md
# make recognition which attention sites of the list are recognised and fused
# make lint        ruff and mypy
#
# Settings: PYTHON=python3.12  TORCH=2.11.0  VENV=path  PYTEST_ARGS='-k mask'  DEMO_ARGS='--tokens 1024'  BENCH_ARGS=...

PYTHON ?= python3
TORCH ?= 2.13.0
VENV ?= .venv
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=
# Test processes: one a core, but not so many that a large machine spends its time importing torch.
JOBS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); [ $$n -gt 8 ] && echo 8 || echo $$n)

BIN := $(VENV)/bin
STAMP := $(VENV)/.refocus-torch-$(TORCH)

.PHONY: demo test bench-cpu bench-training bench-gpu recognition lint wheel clean
.DELETE_ON_ERROR:

demo: $(STAMP)
	$(BIN)/python examples/quickstart.py $(DEMO_ARGS)

# A file of tests stays in one process: what its tests share is made once.
test: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

bench-cpu: $(STAMP)
	$(BIN)/python -m benchmarks.cpu $(BENCH_ARGS)

bench-training: $(STAMP)
	$(BIN)/python -m benchmarks.training $(BENCH_ARGS)

bench-gpu: $(STAMP)
	$(BIN)/python -m benchmarks.gpu $(BENCH_ARGS)

recognition: $(STAMP)
	$(BIN)/python -m benchmarks.recognition $(BENCH_ARGS)

# mypy is given the package as it is installed: the checkout has it under other folder names.
lint: $(STAMP)
	rm -rf build
	$(BIN)/python -m pip install --quiet --no-deps --target build/typed .
	$(BIN)/python -m pip install --quiet 'ruff>=0.12' 'mypy>=1.15'
	$(BIN)/ruff check .
	MYPYPATH=build/typed $(BIN)/mypy -p refocus

wheel: $(STAMP)
	rm -rf build
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

# torch comes first and alone, so that the release asked for is the one that gets installed; a constraint then keeps
# everything after it from replacing it. timm needs the torchvision made for that torch: where there is none, the
# environment is made without timm and the tests that need it are skipped.
$(STAMP): pyproject.toml
	[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV) || $(PYTHON) -m virtualenv $(VENV)
	$(BIN)/python -m pip install torch==$(TORCH)
	$(BIN)/python -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' > $(VENV)/constraints.txt
	$(BIN)/python -m pip install -c $(VENV)/constraints.txt -e '.[test,report]' || \
	$(BIN)/python -m pip install -c $(VENV)/constraints.txt -e '.[test-core,report]'
	rm -f $(VENV)/.refocus-torch-*
	touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
