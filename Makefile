# make demo   a private environment, the build, and IPRM against its baselines on scanned digits
# make test   linters, then the whole suite, then the Triton kernels under the interpreter
# make fuzz   hostile arguments and files: the suite's fuzz tests with six times the examples, 5,000 and more, counted
# make sanitize  the operators' tests on C++ kernels built with AddressSanitizer and UndefinedBehaviorSanitizer (gcc), in build/sanitize
# make bench  operators, head step and epochs against plain and compiled torch: a table, JSON and a plot
# make gpu-check  build, GPU tests, compute-sanitizer and benchmarks on a machine with a GPU, by the Python that is there
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: install demo test fuzz sanitize bench gpu-check clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml setup.py constraints.txt $(shell find csrc -type f)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch numpy "setuptools>=77" "pybind11>=2.13" ninja
	$(BIN)/pip install -q --no-build-isolation -c constraints.txt -e ".[dev]"
	touch $@

demo: install
	$(BIN)/iprm compare --data digits --output runs/demo

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/pytest -q -n 2 tests/iprm_kernels -k triton

fuzz: install
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -s --hypothesis-profile fuzz $(wildcard tests/*/test_hostile*.py tests/*/*/test_hostile*.py)

# Preloaded, as Python itself is not built with them; libstdc++ too, or exceptions pass the sanitizers by. Leaks are not looked for:
# Python and torch end with thousands of allocations that they never free. torch's own libraries free by one allocator what another
# gave, and its tests ask for memory that there is not. Left out are tests of what is not in this extension (Triton, CUDA on the host
# and nvcc, which the preloaded libraries break) and of memory, of which the sanitizers take their own.
SANITIZED := build/sanitize
SANITIZERS = $(foreach name,asan ubsan stdc++,$(shell $(CXX) -print-file-name=lib$(name).so))
NOT_SANITIZED := $(wildcard tests/iprm_kernels/test_triton*_compile.py) $(addprefix tests/iprm_kernels/,test_cuda_head.py test_memory.py)
sanitize: install
	rm -rf $(SANITIZED)
	IPRM_KERNELS_BUILD=cpu IPRM_KERNELS_SANITIZE=1 $(BIN)/python setup.py -q build \
	  --build-lib $(SANITIZED) --build-temp $(SANITIZED)-objects
	LD_PRELOAD="$(SANITIZERS)" PYTHONPATH=$(CURDIR)/$(SANITIZED) OMP_NUM_THREADS=1 \
	  ASAN_OPTIONS=detect_leaks=0:alloc_dealloc_mismatch=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
	  IPRM_KERNELS_BACKEND= $(BIN)/pytest -q tests/iprm_kernels tests/test_sanitize.py $(addprefix --ignore ,$(NOT_SANITIZED))

# OUT=FOLDER takes the results elsewhere
OUT ?= runs/bench
bench: install
	mkdir -p $(OUT)
	$(BIN)/pytest -q benchmarks --benchmark-json=$(OUT)/results.json
	$(BIN)/python benchmarks/plot.py $(OUT)/results.json $(OUT)/results.png

gpu-check:
	PYTHON=$(PYTHON) bash benchmarks/gpu_check.sh $(OUT)

clean:
	rm -rf $(VENV) build dist *.egg-info iprm_kernels/_C*.so runs
