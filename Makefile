# Each target sets up what it needs; a second call with nothing changed starts at once.
#   make test                     in .venv, which is made here with a pinned torch
#   make test PYTHON=python3.12   the same, from another base interpreter
#   make test VENV=               no .venv: PYTHON's own packages and torch >= 2.11, as they are
#   make test ARGS="-k linear"    ARGS reach pytest, the demo or the benchmark
#   make check-cuda               needs nvcc, no GPU: kernels run on the CPU, compiled for every architecture, and read
#   make check-cuda-link          needs nvcc, no GPU: the extension built against a CUDA build of torch, and loaded
#   make gpu-check VENV= OUT=dir  needs a GPU: builds for it, runs its tests and benchmark (STAGE=build|test|bench)
PYTHON ?= python3
VENV ?= .venv
ARGS ?=

ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
READY :=
TIMM :=
else
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
TIMM := build/timm/.ready
endif

SOURCES := setup.py \
    $(shell find csrc -path csrc/cuda -prune -o \( -name '*.cpp' -o -name '*.h' -o -name '*.inl' \) -print)
RUN := PYTHONPATH="$(CURDIR)" $(PY)

.PHONY: demo test bench compatibility lint test-asan test-avx512 check-cuda check-cuda-link gpu-check build clean FORCE
build: build/.built

demo: build/.built
	$(RUN) bench/demo.py $(ARGS)

test: build/.built $(TIMM)
	$(RUN) -m pytest $(ARGS)

bench: build/.built
	$(RUN) bench/run.py $(ARGS)

# Runs the tests that prove what fastnn works with, and writes their table.
compatibility: build/.built $(TIMM)
	$(RUN) -m pytest -q -m works --compatibility=docs/compatibility.md $(ARGS)

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	PATH="$(VENV)/bin:$$PATH" clang-format --dry-run -Werror \
	    $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.inl' 'csrc/*.cu*' 'tests/cuda_host/*.cpp' 'tests/cuda_host/*.h')

# The tests of the kernels again, on other builds of them, in minutes. $(1): its folder, $(2): compiler flags.
KERNEL_TESTS := $(wildcard tests/test_testing.py tests/test_linear*.py tests/test_conv2d*.py tests/test_rnn*.py \
                           tests/test_attention*.py)
define built-with
	FASTNN_CXXFLAGS="$(2)" $(PY) setup.py -q build --build-base build/$(1) --build-lib build/$(1)/lib
endef
# The tree's own package must not come first (before Python 3.11 it does, and the assertion says so).
TESTED_AT = PYTHONSAFEPATH=1 PYTHONPATH="$(CURDIR)/build/$(1)/lib"
TEST_THAT = $(PY) -c 'import fastnn; assert "build/$(1)" in fastnn.__file__, fastnn.__file__' \
	    && $(PY) -m pytest -o pythonpath= -k $(2) $(or $(ARGS),$(KERNEL_TESTS))

# Each access checked.
SANITIZE := -O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
test-asan: $(READY)
	LDFLAGS="-fsanitize=address,undefined" $(call built-with,asan,$(SANITIZE))
	export LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libubsan.so)" \
	    ASAN_OPTIONS=detect_leaks=0:handle_segv=0 UBSAN_OPTIONS=print_stacktrace=1 $(call TESTED_AT,asan); \
	    $(call TEST_THAT,asan,"not compile and not profil")

# The AVX-512 kernels on a CPU without it: the same text at the same width, each vector in two halves of AVX2.
test-avx512: $(READY)
	$(call built-with,avx512,-O1 -DFASTNN_AVX512_ON_AVX2)
	export $(call TESTED_AT,avx512); $(call TEST_THAT,avx512,avx512)

# The CUDA kernels with no GPU: run on the CPU by a shim under sanitizers, compiled for every architecture, and their
# machine code read for spills and for the instructions that were meant.
check-cuda:
	$(MAKE) --no-print-directory -f tests/cuda_host/Makefile -j2 PYTHON=$(PYTHON) host gates

# The extension against a CUDA build of torch, on a machine without a GPU: it links, loads, registers a kernel for each
# op that says it has one, and the CPU's kernels still serve. CUDA_VENV names an environment that has such a torch;
# the one made here fetches gigabytes. One architecture unless TORCH_CUDA_ARCH_LIST asks for more.
CUDA_VENV ?= build/cuda-link/venv
CUDA_TORCH ?= torch==2.11.0
check-cuda-link: $(if $(filter build/cuda-link/%,$(CUDA_VENV)),$(CUDA_VENV)/.ready)
	export CUDA_HOME="$${CUDA_HOME:-$$(test -e /usr/local/cuda/bin/nvcc && echo /usr/local/cuda)}"; \
	PATH="$(CUDA_VENV)/bin:$$PATH" FASTNN_CUDA=1 TORCH_CUDA_ARCH_LIST="$(or $(TORCH_CUDA_ARCH_LIST),9.0a)" \
	    $(CUDA_VENV)/bin/python setup.py -q build --build-base build/cuda-link --build-lib build/cuda-link/lib
	PYTHONSAFEPATH=1 PYTHONPATH="$(CURDIR)/build/cuda-link/lib" $(CUDA_VENV)/bin/python tests/cuda_link.py

build/cuda-link/%/.ready:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -q --disable-pip-version-check $(CUDA_TORCH) 'setuptools>=77' wheel pybind11 ninja numpy
	touch $@

# On a machine with a GPU, a torch that sees it, and nvcc. What it writes to OUT, and in how many minutes: the script says.
OUT ?= build/gpu-check
gpu-check: $(READY)
	$(RUN) bench/gpu_check.py --out "$(OUT)" $(addprefix --stage ,$(STAGE)) $(ARGS)

clean:
	rm -rf build dist *.egg-info fastnn/*.so

$(VENV)/.ready: requirements.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "fastnn needs Python 3.10 or newer"'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check -r requirements.txt
	touch $@

# Not in .venv: timm wants torchvision, whose wheel is built with CUDA and, beside a CPU build of torch, breaks the import of
# transformers. tests/torchvision_schemas.py lets tests import the two.
build/timm/.ready: $(READY)
	$(PY) -m pip install -q --disable-pip-version-check --no-deps --upgrade --target $(@D) timm==1.0.31 torchvision==0.28.0
	touch $@

# The extension lies beside the Python files (fastnn/_C*.so). Ninja compiles only what changed; build/interpreter
# changes when another interpreter or torch is to load it.
build/.built: $(SOURCES) build/interpreter $(READY)
	$(PY) setup.py -q build_ext --inplace
	touch $@

build/interpreter: $(READY) FORCE
	@mkdir -p build
	@$(PY) -c 'import sys, importlib.metadata as m; print(sys.executable, m.version("torch"))' > $@.now \
	    || { echo "make: $(PY) has no torch; install torch >= 2.11 there, or leave VENV alone to get .venv"; exit 1; }
	@cmp -s $@ $@.now || cp $@.now $@
	@rm -f $@.now
