# make demo   sets up .venv, builds, fine-tunes a real model and shows what it learnt
# make test   sets up what the tests need and runs them against the installed package
# make lint   ruff, mypy, imports, clang-format          make ctest   the C core's own tests
# make cudatest  the CUDA core's own tests, on a CPU     make gputest   the Python tests on the GPU's backends
# make parity installs PyTorch, transformers, PEFT and llama.cpp, so that `make test` compares with them too
# make clib   the C library by CMake in build/prefix, and its tests beside Python      make fuzz   its readers of files
# make clean  removes .venv, out and what was built
#
# Needs Python >= 3.10 with its headers, a C compiler and make. The CUDA library is built too where an NVIDIA
# driver is there, or with PYLORA_CUDA=on, and nvcc is found. Another Python: make PYTHON=python3.12
# WHEEL=FILE installs that wheel; none is built.

PYTHON ?= python3
VENV ?= .venv
OUT ?= out/demo
DEMO_ARGS ?=
PYTEST_ARGS ?=
CC ?= cc

.DELETE_ON_ERROR:
.PHONY: demo test parity lint ctest cudatest gputest clib fuzz clean install

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# pip and the compiler are quiet; this says what they are at and for how long.
TOLD = @$(PYTHON) tools/told.py
INSTALL = $(PIP) install --quiet
needs = $$($(BIN)/python tools/requirements.py $1)
SOURCES := pyproject.toml setup.py MANIFEST.in LICENSE README.md \
  $(shell find pylora -name '*.py' -o -name '*.pyi' -o -name '*.jsonl' -o -name py.typed) \
  $(shell find csrc -type f)
# The one wheel that was built: every extra is installed from it, so the core compiles once.
WHEEL ?=
BUILT = $(or $(WHEEL),$$(ls $(VENV)/dist/pylora*.whl))
JOBS ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
# The C core that the wheel was built of, for the examples and ports that tests compile.
CORE_LIB := $(wildcard $(CURDIR)/build/core/libpylora.a)
# A test process for each processor, and in each of them one thread of NumPy's and PyTorch's own.
PYTEST := $(if $(PYLORA_CORE_LIB),,$(CORE_LIB:%=PYLORA_CORE_LIB=%)) OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 \
  bin/python -m pytest -c "$(CURDIR)/pyproject.toml" --rootdir "$(CURDIR)" -n $(JOBS) --dist worksteal

demo: install
	$(BIN)/pylora demo --out $(OUT) $(DEMO_ARGS)

# Packages are fetched while the core compiles.
install:
	@$(MAKE) --no-print-directory -j2 $(VENV)/.all

# Run from inside the environment, so that `import pylora` finds the installed package.
test:
	@$(MAKE) --no-print-directory -j2 $(VENV)/.test
	cd $(VENV) && PYLORA_TEST_BACKENDS=numpy,c $(PYTEST) "$(CURDIR)/tests" $(PYTEST_ARGS)

# Those tests that are about a backend, on the GPU's: on a GPU, or emulated where there is none.
gputest: $(VENV)/.test
	cd $(VENV) && PYLORA_TEST_BACKENDS=cuda,cupy $(PYTEST) "$(CURDIR)/tests" -k "cuda or cupy" $(PYTEST_ARGS)

parity: $(VENV)/.parity

$(VENV)/.venv:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and "pylora needs Python 3.10 or newer; this is %d.%d. Name another: make PYTHON=python3.12" % v[:2])'
	@$(PYTHON) -c 'import os, sys, sysconfig; p = os.path.join(sysconfig.get_paths()["include"], "Python.h"); sys.exit(not os.path.exists(p) and "the headers of Python are missing (" + p + "); on Debian: apt-get install python3-dev")'
	$(TOLD) "Making $(VENV)" $(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.needs-build: $(VENV)/.venv pyproject.toml
	$(TOLD) "Installing what the build needs" $(INSTALL) $(call needs,build)
	@touch $@

$(VENV)/.needs-%: $(VENV)/.needs-build
	$(TOLD) "Installing the packages of: base $*" $(INSTALL) $(call needs,base $*)
	@touch $@

$(VENV)/.built: $(VENV)/.needs-build $(if $(WHEEL),$(WHEEL),$(SOURCES))
ifeq ($(WHEEL),)
	@rm -rf $(VENV)/dist build/lib* build/bdist*
	$(TOLD) "Building pylora: the C core is compiled" $(BIN)/python -c \
	  "import setuptools.build_meta as b; b.build_wheel('$(VENV)/dist')"
endif
	$(TOLD) "Installing pylora" $(INSTALL) --no-deps --force-reinstall $(BUILT)
	@touch $@

$(VENV)/.all: $(VENV)/.needs-all $(VENV)/.built
	@touch $@

$(VENV)/.test: $(VENV)/.needs-test $(VENV)/.built
	@touch $@

$(VENV)/.lint: $(VENV)/.needs-test $(VENV)/.needs-lint $(VENV)/.built
	@touch $@

# Of llama.cpp only the tokenizer is asked, so it is compiled for time of compiling, not of running.
LLAMA_CPP := -DGGML_NATIVE=OFF -DGGML_OPENMP=OFF -DLLAVA_BUILD=OFF -DMTMD_BUILD=OFF \
  -DCMAKE_C_FLAGS_RELEASE=-O1 -DCMAKE_CXX_FLAGS_RELEASE=-O1

# torch first and pinned, so that nothing else decides which build of it is fetched.
$(VENV)/.needs-parity: $(VENV)/.needs-test
	$(TOLD) "Installing PyTorch" $(INSTALL) torch==2.13.0
	$(TOLD) "Installing transformers, PEFT, llama.cpp and others" \
	  env CMAKE_ARGS="$(LLAMA_CPP)" $(INSTALL) $(call needs,parity)
	@touch $@

$(VENV)/.parity: $(VENV)/.needs-parity $(VENV)/.test
	@touch $@

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy pylora
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run -Werror $$(find csrc tests/c tests/cuda tests/fuzz examples -name '*.c' -o -name '*.h' -o -name '*.inc' \
	  -o -name '*.cu' -o -name '*.cuh' -o -name '*.cpp')

ctest:
	$(MAKE) -j$(JOBS) -C tests/c check CC="$(CC)"

# Installed where it can be looked at; kernels that the wheel was built of are not compiled again.
clib: $(VENV)/.test
	cmake -S csrc -B build/cmake $(CORE_LIB:%=-DPYLORA_KERNELS=%)
	cmake --build build/cmake -j $(JOBS)
	cmake --install build/cmake --prefix build/prefix
	cd $(VENV) && PYLORA_C_PREFIX="$(CURDIR)/build/prefix" $(PYTEST) "$(CURDIR)/tests/clib" $(PYTEST_ARGS)

fuzz:
	$(MAKE) -j$(JOBS) -C tests/fuzz run $(CORE_LIB:%=CORE_LIB=%)

# The CUDA core without a GPU: its tests over an emulation of CUDA. See also tools/gpu_check.sh.
cudatest:
	$(MAKE) -j$(JOBS) -C tests/cuda check CC="$(CC)"

clean:
	rm -rf $(VENV) build dist pylora*.egg-info out
	find pylora -name '_core*.so' -o -name '_core*.c' | xargs rm -f
	rm -f pylora/backends/libpylora_cuda.so pylora/backends/_cuda_abi.py pylora/backends/_cuda_kernels.cu.gz pylora/backends/_cuda_note.txt
	for d in tests/c tests/cuda tests/fuzz; do if [ -f $$d/Makefile ]; then $(MAKE) -C $$d clean; fi; done
