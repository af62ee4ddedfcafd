# make demo: the first run.   make test: all tests.   make lint: style and types.
# make sanitize: the compiled kernel under sanitizers.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test lint sanitize

demo: $(INSTALLED)
	$(BIN)/secateur compress recipes/lenet5-digits.yaml --out runs/demo

# One thread for each of the parallel test processes, so that they do not fight for cores.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# The N:M kernel under the address and the undefined-behaviour sanitizer; BUILD is where it goes.
BUILD ?= build
sanitize:
	mkdir -p $(BUILD)
	$(CXX) -std=c++17 -O1 -g -Wall -Wextra -Werror -ffp-contract=off -fno-omit-frame-pointer \
		-fsanitize=address,undefined -fno-sanitize-recover=all -pthread \
		tests/nm_kernel.cpp -o $(BUILD)/nm_kernel
	$(BUILD)/nm_kernel

$(INSTALLED): pyproject.toml src/secateur/kernels/nm.cpp
	$(PYTHON) -c 'import sys; sys.exit("secateur needs Python 3.10 or newer" if sys.version_info < (3, 10) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -e ".[dev]"
	touch $@
