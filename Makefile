# Two commands do everything, set-up included: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CORES ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)
# On a terminal, bars instead of lines for every job
SNAKEMAKE := $(BIN)/snakemake --cores $(CORES) $(shell test -t 2 && echo --logger rich || echo --quiet rules)

.PHONY: demo test test-slow test-browser test-slurm lint docs bench clean

demo: $(VENV)/installed results/demo/cohort/slides.csv
	$(SNAKEMAKE)
	@$(BIN)/gmmamba summary results/demo

test: $(VENV)/installed
	$(BIN)/python -m pytest -n $(CORES) --dist loadfile

test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -n $(CORES) --dist loadfile -m slow

# Chromium comes from Debian; playwright, which drives it, from PyPI, without browsers of its own.
test-browser: $(VENV)/installed
	@command -v chromium > /dev/null || { apt-get update && apt-get install --yes --no-install-recommends chromium; }
	$(BIN)/python -m pytest -n 0 -m browser tests/browser

# Slurm itself comes from Debian or Ubuntu; its daemons run by hand, in a folder of the tests' own.
test-slurm: $(VENV)/installed
	@command -v slurmctld > /dev/null || { apt-get update && apt-get install --yes --no-install-recommends slurmctld slurmd slurm-client munge; }
	$(BIN)/python -m pytest -n 0 -m slurm tests/cluster

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/snakefmt --check Snakefile workflow

# Every link must lead somewhere, or it fails; build/site/index.html opens from disk. Nothing is fetched.
docs: $(VENV)/installed
	$(BIN)/python docs/site/pages.py build/docs
	$(BIN)/zensical build --strict --clean

# Hours on two cores; a short run: .venv/bin/python -m benchmarks.model --sizes 1000,4000 --groups 10
bench: $(VENV)/installed
	$(BIN)/python -m benchmarks.model --write docs/performance.md
	$(BIN)/python -m benchmarks.dag --write docs/performance.md
	$(BIN)/python -m benchmarks.coverage --write docs/statistics.md
	$(BIN)/python -m benchmarks.reading --write docs/performance.md
	$(BIN)/python -m benchmarks.encoding --write docs/performance.md
	$(BIN)/python -m benchmarks.large --write docs/performance.md
	$(BIN)/python -m benchmarks.cost measure --csv docs/cost.csv --write docs/performance.md

# The embedded cohort is drawn by the project; its sheet is written last.
results/demo/cohort/slides.csv: | $(VENV)/installed
	$(BIN)/python -m preprocessing demo-cohort --out results/demo/cohort

# uv where it is there (three times faster), else pip; an unfinished set-up leaves no stamp and is begun again.
$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(f"gmmamba needs Python 3.11 or newer, {sys.executable} is {sys.version.split()[0]}: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	@if command -v uv > /dev/null; then \
		uv venv --allow-existing --python "$$(command -v $(PYTHON))" $(VENV) && uv pip install --compile-bytecode --python $(BIN)/python --editable ".[dev]"; \
	else \
		$(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install --editable ".[dev]"; \
	fi
	@touch $@

clean:
	rm -rf results .snakemake build .cache
