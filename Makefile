# `make demo` and `make test` need nothing but Python 3.11 to 3.13: they make the environment themselves.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test check format cpp-test sanitize gpu-check bench bench-save bench-compare results clean

demo: $(READY)  ## paint data, train a few minutes, evaluate, translate; pictures in demo/
	rm -rf demo
	$(BIN)/fastpix2pix demo --out demo

test: $(READY)  ## the whole test suite, in JOBS processes of one thread each
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist loadfile

check: $(READY)  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

cpp-test: $(READY)  ## build and run the C++ programs of tests/cpp
	$(BIN)/pytest -s -k plain tests/native/test_cpp.py

sanitize: $(READY)  ## the same under ThreadSanitizer, and under AddressSanitizer with undefined behaviour
	FASTPIX2PIX_SANITIZE=1 $(BIN)/pytest -s -k 'thread or address' tests/native/test_cpp.py

gpu-check:  ## correctness and speed on this machine's GPU; installs nothing: PYTHON needs torch, triton, numpy
	$(PYTHON) -m bench.gpu_check $(if $(PARTS),--parts $(PARTS)) $(if $(BUDGET),--budget $(BUDGET))

bench: $(READY)  ## everything beside plain baselines: a table here, plots in benchmark/index.html
	$(BIN)/fastpix2pix bench --out benchmark

bench-save: $(READY)  ## keep the ratios of this machine for bench-compare
	$(BIN)/python -m bench.gate save

bench-compare: $(READY)  ## exit code 4 (make: Error 4) where something became slower than bench/thresholds.toml allows
	$(BIN)/python -m bench.gate compare $(if $(PLANT),--plant '$(PLANT)')

results: $(READY)  ## README's figures and plots from bench/results/; ADD=benchmark/result.json takes a record in first
	$(BIN)/python -m bench.results $(if $(ADD),--add $(ADD))

clean:  ## remove the environment and everything made
	rm -rf $(VENV) build demo benchmark *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(READY): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v <= (3, 13) or sys.exit("Python %d.%d: fastpix2pix needs 3.11 to 3.13; say make PYTHON=python3.12" % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e '.[test,dev]'
	touch $(READY)
