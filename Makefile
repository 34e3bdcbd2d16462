# make demo      a private environment, the build, and IPRM against its baselines on scanned digits
# make test      ruff and the default tier of the tests, then the same tier of the Triton kernels under the interpreter
# make test-all  the rest: mypy, which takes a minute without its cache, and the tiers `grid` and `slow` of the tests
# make fuzz      the fuzz tests of arguments and files with six times the examples, more than 5,000, counted; FUZZ=weekly: 20,000
# make sanitize  the operators' tests on C++ kernels built with AddressSanitizer and UndefinedBehaviorSanitizer (gcc), in build/sanitize
# make test-cuda-build  a wheel of the CUDA build in an environment of its own, and the operators' tests on it, without a GPU
# make bench     operators, head step and epochs beside plain and compiled torch: a table, JSON and a plot
# make gpu-check build, GPU tests, compute-sanitizer and benchmarks on a machine with a GPU, with PYTHON; HALF=tests or HALF=benchmarks
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# --no-compile: pip would compile every module of torch, triton and sympy; Python compiles those that it imports, and keeps them
PIP := $(BIN)/pip install -q --no-compile -c constraints.txt
unexport PYTHONDONTWRITEBYTECODE
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# ninja on PATH, or torch compiles one file at a time; without make's job server, which ninja does not share
BUILD := PATH="$(CURDIR)/$(BIN):$$PATH" MAKEFLAGS= $(BIN)/python setup.py -q build_ext
# two jobs: the extension is compiled while pip downloads, and the linters run beside the tests
MAKEFLAGS += --jobs=2

.PHONY: install demo test test-all lint types suite fuzz sanitize test-cuda-build bench gpu-check clean

demo: $(VENV)/installed
	$(BIN)/iprm compare --data digits --output runs/demo

install: $(VENV)/tools

# what compiles the extension
$(VENV)/torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch numpy "setuptools>=77" "pybind11>=2.13" ninja
	touch $@

$(VENV)/extension: $(VENV)/torch setup.py $(shell find csrc -type f)
	$(BUILD) > $(VENV)/build.log 2>&1 || { cat $(VENV)/build.log; exit 1; }
	touch $@

# `none`: this installation leaves the extension to the rule above
$(VENV)/packages: $(VENV)/torch setup.py pyproject.toml
	IPRM_KERNELS_BUILD=none $(PIP) --no-build-isolation -e ".[train]"
	touch $@

# all that a demo needs; in place, as nothing but a link is left to do
$(VENV)/installed: $(VENV)/extension $(VENV)/packages
	$(BUILD) --inplace
	touch $@

# and all that the tests need
$(VENV)/tools: $(VENV)/installed
	IPRM_KERNELS_BUILD=none $(PIP) --no-build-isolation -e ".[dev]"
	$(BUILD) --inplace
	touch $@

test: lint suite

lint: $(VENV)/tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/tools
	$(BIN)/mypy

PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist worksteal
INTERPRETED := TRITON_INTERPRET=1 $(PYTEST) tests/iprm_kernels -k triton
suite: $(VENV)/tools
	$(PYTEST)
	$(INTERPRETED)

test-all: types $(VENV)/tools
	$(PYTEST) -m "grid or slow"
	$(INTERPRETED) -m "grid or slow"

# the test that counts comes last
HOSTILE_TOTAL := tests/iprm_kernels/test_hostile_total.py
HOSTILE := $(filter-out $(HOSTILE_TOTAL),$(wildcard tests/*/test_hostile*.py tests/*/*/test_hostile*.py)) $(HOSTILE_TOTAL)
FUZZ ?= fuzz
fuzz: install
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -s -m "" --hypothesis-profile $(FUZZ) $(HOSTILE)

# The sanitizers' libraries are preloaded, because Python is built without them; libstdc++ too, or they miss exceptions. Leaks are not
# reported: Python and torch never free thousands of allocations. torch's libraries allocate and free with different allocators, and
# some tests request more memory than there is. Left out are tests of code outside this extension (Triton, CUDA on the host, nvcc, which
# the preloaded libraries break) and of memory use, to which the sanitizers add.
SANITIZED := build/sanitize
SANITIZERS = $(foreach name,asan ubsan stdc++,$(shell $(CXX) -print-file-name=lib$(name).so))
NOT_SANITIZED := $(wildcard tests/iprm_kernels/test_triton*.py) $(addprefix tests/iprm_kernels/,test_cuda_head.py test_memory.py)
sanitize: install
	rm -rf $(SANITIZED)
	IPRM_KERNELS_BUILD=cpu IPRM_KERNELS_SANITIZE=1 $(BIN)/python setup.py -q build \
	  --build-lib $(SANITIZED) --build-temp $(SANITIZED)-objects
	LD_PRELOAD="$(SANITIZERS)" PYTHONPATH=$(CURDIR)/$(SANITIZED) OMP_NUM_THREADS=1 \
	  ASAN_OPTIONS=detect_leaks=0:alloc_dealloc_mismatch=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
	  IPRM_KERNELS_BACKEND= $(BIN)/pytest -q -m "" tests/iprm_kernels tests/test_sanitize.py $(addprefix --ignore ,$(NOT_SANITIZED))

# A wheel of the CUDA build, for all architectures, installed in an environment of its own, and the operators' tests on it. No GPU
# is needed; nvcc and 12 GB of disk are.
CUDA_TORCH ?= 2.14.1
CUDA_VENV := build/cuda/venv
CUDA_CORE := $(addprefix tests/iprm_kernels/test_,geodesic.py divergence.py average.py head.py head_pairs.py probe_rebalance.py \
  accuracy.py head_accuracy.py registration.py backends.py)
test-cuda-build:
	rm -rf build/cuda
	$(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/pip install -q --no-compile torch==$(CUDA_TORCH) numpy "setuptools>=77" "pybind11>=2.13" ninja \
	  pytest pytest-xdist pytest-benchmark hypothesis mpmath
	PATH="$(CURDIR)/$(CUDA_VENV)/bin:$$PATH" MAKEFLAGS= IPRM_KERNELS_BUILD=cuda $(CUDA_VENV)/bin/pip wheel -q \
	  --no-build-isolation --no-deps --wheel-dir build/cuda .
	$(CUDA_VENV)/bin/pip install -q --no-deps --no-index build/cuda/*.whl
	$(CUDA_VENV)/bin/python -P tests/support/cuda_build.py
	OMP_NUM_THREADS=1 $(CUDA_VENV)/bin/pytest -q -n 2 $(CUDA_CORE)

# OUT: the folder of the results
OUT ?= runs/bench
bench: install
	mkdir -p $(OUT)
	$(BIN)/pytest -q benchmarks --benchmark-json=$(OUT)/results.json
	$(BIN)/python benchmarks/plot.py $(OUT)/results.json $(OUT)/results.png

gpu-check:
	PYTHON=$(PYTHON) bash benchmarks/gpu_check.sh $(OUT) $(HALF)

clean:
	rm -rf $(VENV) build dist *.egg-info iprm_kernels/_C*.so runs
