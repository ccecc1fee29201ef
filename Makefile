# Two commands do everything, set-up included: `make demo` and `make test`.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test paper bench bench-packs docs site families clean

demo: $(VENV)/demo.stamp
	$(BIN)/dare demo

test: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

# The paper's experiments, from training to docs/paper: 25 CPU minutes in two processes, 14 minutes on two quiet cores. `make paper ONLY=ad` runs two of them.
paper: $(VENV)/paper.stamp
	$(BIN)/python paper/rerun.py $(if $(ONLY),--only $(ONLY))

bench: $(VENV)/dev.stamp
	$(BIN)/python bench/run.py $(BENCH)

bench-packs: $(VENV)/dev.stamp
	$(BIN)/python bench/packs.py $(BENCH)

docs: $(VENV)/dev.stamp
	$(BIN)/python docs/generate.py

site: $(VENV)/dev.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# The table of what transformers knows of its classes' tensors: six minutes on one core, after a new version is pinned.
families: $(VENV)/dev.stamp
	$(BIN)/python scripts/families.py

# torch first and alone: pinned, it is the CPU build where one is at hand, and nothing later replaces it.
$(VENV)/torch.stamp: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "darekit needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	touch $@

$(VENV)/demo.stamp: $(VENV)/torch.stamp pyproject.toml
	$(PIP) -e '.[demo]'
	touch $@

$(VENV)/paper.stamp: $(VENV)/torch.stamp pyproject.toml
	$(PIP) -e '.[eval]'
	touch $@

$(VENV)/dev.stamp: $(VENV)/torch.stamp pyproject.toml
	$(PIP) -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
