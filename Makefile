# Each target sets up what it needs; a second call with nothing changed starts at once.
#   make test                     in .venv, which is made here with a pinned torch
#   make test PYTHON=python3.12   the same, from another base interpreter
#   make test VENV=               no .venv: PYTHON's own packages and torch >= 2.11, as they are
#   make test ARGS="-k linear"    ARGS reach pytest, the demo or the benchmark
PYTHON ?= python3
VENV ?= .venv
ARGS ?=

ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
READY :=
else
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
endif

SOURCES := setup.py $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inl')
RUN := PYTHONPATH="$(CURDIR)" $(PY)

.PHONY: demo test bench lint test-asan build clean FORCE
build: build/.built

demo: build/.built
	$(RUN) bench/demo.py $(ARGS)

test: build/.built
	$(RUN) -m pytest $(ARGS)

bench: build/.built
	$(RUN) bench/run.py $(ARGS)

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	PATH="$(VENV)/bin:$$PATH" clang-format --dry-run -Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.inl')

# The tests of the kernels again, with kernels that check each access: minutes to build, and several times slower.
ASAN_TESTS := tests/test_testing.py tests/test_linear.py tests/test_conv2d.py tests/test_rnn.py tests/test_attention.py
SANITIZE := -O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
test-asan: $(READY)
	FASTNN_CXXFLAGS="$(SANITIZE)" LDFLAGS="-fsanitize=address,undefined" \
	    $(PY) setup.py -q build --build-base build/asan --build-lib build/asan/lib
	LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libubsan.so)" \
	    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH="$(CURDIR)/build/asan/lib" \
	    $(PY) -m pytest -o pythonpath= -k "not compile and not profil" $(or $(ARGS),$(wildcard $(ASAN_TESTS)))

clean:
	rm -rf build dist *.egg-info fastnn/*.so

$(VENV)/.ready: requirements.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "fastnn needs Python 3.10 or newer"'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check -r requirements.txt
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
