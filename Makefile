# make demo and make test do everything from a fresh clone: environment, install, job.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= requirements/tested.txt
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-numeric test-long test-lowest test-newest suite lint help wheel clean

demo: $(STAMP)
	$(BIN)/clip-po demo --output_dir demo_output

test: lint suite

suite: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Sums come in another order on other kernels and threads. Tests must allow for that and no more.
test-numeric: $(STAMP)
	for kernels in default avx2 ""; do \
	  HF_HUB_OFFLINE=1 CLIP_PO_TEST_THREADS="1 2 4" OMP_WAIT_POLICY=passive $${kernels:+env ATEN_CPU_CAPABILITY=$$kernels} \
	    $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "numeric and not long" || exit 1; \
	done

# Fault runs of minutes, which `make test` leaves out.
test-long: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m long

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The pages that clip-po COMMAND --help prints.
help: $(STAMP)
	$(BIN)/python -m clip_po.cli.help

wheel: $(STAMP)
	$(BIN)/python -m build

# The suite on the oldest versions that pyproject.toml allows, and on the newest on the index.
test-lowest test-newest: test-%:
	$(MAKE) suite VENV=.venv-$* CONSTRAINTS=requirements/$*.txt

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$$($(PYTHON) --version) is too old: clip_po needs 3.11. Name a newer one: make PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --no-deps open_clip_torch
	touch $@

clean:
	rm -rf $(VENV) .venv-lowest .venv-newest build dist demo_output *.egg-info
