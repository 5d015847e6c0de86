# make demo   sets up .venv, builds, fine-tunes a real model and shows what it learnt
# make test   sets up what the tests need and runs them against the installed package
# make lint   ruff, mypy, imports, clang-format          make ctest   the C core's own tests
# make cudatest  the CUDA core's own tests, on a CPU     make gputest   the Python tests on the GPU's backends
# make parity installs PyTorch, transformers and PEFT, so that `make test` compares with them too
# make clean  removes .venv, out and what was built
#
# Needs Python >= 3.10 with its headers, a C compiler and make; the CUDA library is built too if nvcc is
# found (PYLORA_CUDA=off: not). Another Python: make PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
OUT ?= out/demo
DEMO_ARGS ?=
PYTEST_ARGS ?=
CC ?= cc

.DELETE_ON_ERROR:
.PHONY: demo test parity lint ctest cudatest gputest clean install

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := pyproject.toml setup.py MANIFEST.in LICENSE README.md \
  $(shell find pylora -name '*.py' -o -name '*.pyi' -o -name '*.jsonl' -o -name py.typed) \
  $(shell find csrc -type f)
# The one wheel that was built: every extra is installed from it, so the core compiles once.
WHEEL = $$(ls $(VENV)/dist/pylora-*.whl)

demo: $(VENV)/.all
	$(BIN)/pylora demo --out $(OUT) $(DEMO_ARGS)

# Run from inside the environment, so that `import pylora` finds the installed package.
test: $(VENV)/.test
	cd $(VENV) && PYLORA_TEST_BACKENDS=numpy,c bin/python -m pytest -c "$(CURDIR)/pyproject.toml" \
	  --rootdir "$(CURDIR)" "$(CURDIR)/tests" $(PYTEST_ARGS)

# Those tests that are about a backend, on the GPU's: on a GPU, or emulated where there is none.
gputest: $(VENV)/.test
	cd $(VENV) && PYLORA_TEST_BACKENDS=cuda,cupy bin/python -m pytest -c "$(CURDIR)/pyproject.toml" \
	  --rootdir "$(CURDIR)" "$(CURDIR)/tests" -k "cuda or cupy" $(PYTEST_ARGS)

install: $(VENV)/.all

parity: $(VENV)/.parity

$(VENV)/.venv:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and "pylora needs Python 3.10 or newer; this is %d.%d. Name another: make PYTHON=python3.12" % v[:2])'
	@$(PYTHON) -c 'import os, sys, sysconfig; p = os.path.join(sysconfig.get_paths()["include"], "Python.h"); sys.exit(not os.path.exists(p) and "the headers of Python are missing (" + p + "); on Debian: apt-get install python3-dev")'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.built: $(VENV)/.venv $(SOURCES)
	rm -rf $(VENV)/dist build/lib* build/bdist*
	$(PIP) wheel --quiet --no-deps --wheel-dir $(VENV)/dist .
	$(PIP) install --quiet --no-deps --force-reinstall $(WHEEL)
	touch $@

$(VENV)/.all: $(VENV)/.built
	$(PIP) install --quiet "$(WHEEL)[all]"
	touch $@

$(VENV)/.test: $(VENV)/.built
	$(PIP) install --quiet "$(WHEEL)[test]"
	touch $@

$(VENV)/.lint: $(VENV)/.built
	$(PIP) install --quiet "$(WHEEL)[all,conformance,lint]"
	touch $@

# torch first and pinned, so that nothing else decides which build of it is fetched.
$(VENV)/.parity: $(VENV)/.test
	$(PIP) install --quiet torch==2.13.0
	$(PIP) install --quiet "$(WHEEL)[parity]"
	touch $@

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy pylora
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run -Werror $$(find csrc tests/c tests/cuda examples -name '*.c' -o -name '*.h' -o -name '*.inc' \
	  -o -name '*.cu' -o -name '*.cuh' -o -name '*.cpp')

ctest:
	$(MAKE) -C tests/c check CC="$(CC)"

# The CUDA core without a GPU: its tests over an emulation of CUDA. See also tools/gpu_check.sh.
cudatest:
	$(MAKE) -C tests/cuda check CC="$(CC)"

clean:
	rm -rf $(VENV) build pylora.egg-info out
	find pylora -name '_core*.so' -o -name '_core*.c' | xargs rm -f
	rm -f pylora/backends/libpylora_cuda.so pylora/backends/_cuda_abi.py pylora/backends/_cuda_kernels.cu pylora/backends/_cuda_note.txt
	for d in tests/c tests/cuda; do if [ -f $$d/Makefile ]; then $(MAKE) -C $$d clean; fi; done
