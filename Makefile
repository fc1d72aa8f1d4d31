# The commands that people and CI share. Each makes .venv ready first, the native kernels included, so a
# fresh clone needs only Python 3.11, pip, git and a C++ compiler.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/.ready
ARGS ?=
# What the native kernels are built from; a change builds them again.
NATIVE := CMakeLists.txt $(wildcard native/*.h native/*.cpp)

# On a machine with a GPU: the Python whose torch sees it, and the minutes that measuring may take.
GPU_PYTHON ?= python3
MINUTES ?= 25

.PHONY: help demo test bench gpu docs sanitize lint format clean

help:
	@echo "make demo     a real model with dense and with Loki attention, side by side"
	@echo "make test     the test suite"
	@echo "make bench    time decode steps against torch on this machine"
	@echo "make gpu      test the Triton kernels on a GPU, then time them against its dense kernels"
	@echo "make docs     the documentation site, in build/docs"
	@echo "make sanitize the native kernels under the address and undefined-behaviour sanitizers"
	@echo "make lint     style, types and the import law"
	@echo "make format   rewrite the sources in house style"
	@echo "make clean    remove caches and produced files; .venv stays"
	@echo 'More arguments go into ARGS, as in: make test ARGS="-k cache"'

demo: $(READY)
	$(BIN)/loki-attn demo $(ARGS)

# One thread per test process: two workers with a thread pool each would fight over the cores.
test: export OMP_NUM_THREADS = 1
test: $(READY)
	$(BIN)/python -m pytest -n 2 $(ARGS)

bench: $(READY)
	$(BIN)/loki-attn bench decode $(ARGS)

# Needs no .venv, which holds a torch without CUDA: GPU_PYTHON's packages serve.
gpu:
	TRITON_INTERPRET=0 PYTHONPATH=src $(GPU_PYTHON) -m pytest -m gpu \
		tests/kernels tests/bench tests/integrations/test_static.py $(ARGS)
	PYTHONPATH=src $(GPU_PYTHON) tools/gpu_report.py --minutes $(MINUTES)

docs: $(READY)
	$(BIN)/sphinx-build -W -n docs build/docs $(ARGS)

sanitize: $(READY)
	tools/sanitize.sh $(ARGS)

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf build dist demo .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find src tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

# Rebuilt whenever the dependencies or the native sources change. The build tools are pinned too, and
# installed first: without build isolation, pip takes them from .venv.
$(READY): pyproject.toml constraints.txt $(NATIVE)
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing loki-attn and its tools into .venv; the first time takes a few minutes."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt cmake ninja scikit-build-core setuptools
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --no-build-isolation --editable '.[all,dev]'
	@touch $@
