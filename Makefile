# Two commands do everything, set-up included: `make demo` and `make test`.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test check browser lint wheel test-wheel release-check changelog hooks paper real bench bench-packs docs families \
    site mutants \
    clean

demo: $(VENV)/demo.stamp
	$(BIN)/dare demo

# What everyone runs: 10 minutes on two cores.
test: lint site
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

# What takes longer (tests marked `check`), and how much of the package all tests together run: less than
# `fail_under` in pyproject.toml fails. Where a browser can be installed, the tests that need one may not be skipped.
check: $(VENV)/dev.stamp browser
	DAREKIT_BROWSER=$(if $(CAN_INSTALL),required) $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "check or not check" --cov --cov-report=term

# Debian's Chromium, in which pages are tested: installed where it is missing, we are root, and there is apt-get.
CAN_INSTALL = $(shell [ "$$(id -u)" = 0 ] && command -v apt-get)

browser:
	@if ! { command -v chromium && command -v chromedriver; } >/dev/null && [ -n "$(CAN_INSTALL)" ]; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
	    apt-get install -qq -y --no-install-recommends chromium chromium-driver >/dev/null \
	    || echo "no browser could be installed: the tests that need one will fail"; fi

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# dist/: the source distribution, and the wheel built from it.
wheel: $(VENV)/dev.stamp
	rm -rf dist
	$(BIN)/python -m build --outdir dist .

# The tests against the wheel, in a folder that has everything but the sources, which tests of the documents and of the project need.
test-wheel: wheel
	rm -rf build/wheel && mkdir -p build/wheel
	$(PIP) --no-deps --target build/wheel/installed dist/*.whl
	tar cf - --exclude __pycache__ --exclude scratch --exclude work pyproject.toml README.md bench docs examples paper real tests | tar xf - -C build/wheel
	cd build/wheel && PYTHONPATH="$$PWD/installed" "$(CURDIR)/$(BIN)/python" -m pytest -q -n 2 --dist loadfile tests \
	    --ignore tests/test_docs.py --ignore tests/test_install.py --ignore tests/test_project.py

# Whether the files are ready for the release TAG=v1.2.3, after `make wheel` at that tag.
release-check:
	.ci/release "$(TAG)"

# What the next release will say; with VERSION=1.2.3 it goes into CHANGELOG.md.
changelog: $(VENV)/dev.stamp
	$(BIN)/towncrier build $(if $(VERSION),--yes --version $(VERSION),--draft --version next)

# ruff before every commit.
hooks: $(VENV)/dev.stamp
	$(BIN)/pre-commit install

# The paper's experiments, from training to docs/paper: 25 CPU minutes in two processes, 14 minutes on two quiet cores. `make paper ONLY=ad` runs two of them.
paper: $(VENV)/paper.stamp
	$(BIN)/python paper/rerun.py $(if $(ONLY),--only $(ONLY))

# The paper's claims on a real language model of PyPI, from fine-tuning to docs/real: an hour on two quiet cores. `make real QUICK=1`
# does one task of it in 15 minutes; `make real MODEL=HuggingFaceTB/SmolLM2-135M` another base; ALSO=search,loras,paired adds what takes
# long. What is finished is kept in real/work.
real: $(VENV)/real.stamp
	$(BIN)/python -m real $(if $(QUICK),--quick) $(if $(MODEL),--model $(MODEL)) $(if $(ALSO),--also $(ALSO))

bench: $(VENV)/dev.stamp
	$(BIN)/python bench/run.py $(BENCH)

bench-packs: $(VENV)/dev.stamp
	$(BIN)/python bench/packs.py $(BENCH)

docs: $(VENV)/dev.stamp
	$(BIN)/python docs/generate.py

site: $(VENV)/dev.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# Breaks the heart of the package in one place at a time, to see whether tests notice; nothing is written but build/mutants.
# `make mutants MUTANTS="--only planning/rates --tests rates homology"` takes a minute, all of it some hours.
mutants: $(VENV)/dev.stamp
	$(BIN)/python scripts/mutants.py $(MUTANTS)

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

$(VENV)/real.stamp: $(VENV)/torch.stamp pyproject.toml
	$(PIP) -e '.[real]'
	touch $@

$(VENV)/dev.stamp: $(VENV)/torch.stamp pyproject.toml
	$(PIP) -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist site .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis
