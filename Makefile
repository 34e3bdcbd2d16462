# make demo   a private environment, the build, and IPRM against its baselines on scanned digits
# make test   linters, then the whole suite, then the Triton kernels under the interpreter
# make bench  operators, head step and epochs against plain and compiled torch: a table, JSON and a plot
# make gpu-check  build, GPU tests, compute-sanitizer and benchmarks on a machine with a GPU, by the Python that is there
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: install demo test bench gpu-check clean

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
