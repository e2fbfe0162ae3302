# What can be done here: make help. Needs python3 (3.11.4 or newer) with pip, and GNU make.

PYTHON ?= python3
PROFILE ?= mini
ONLY ?=
DATA_ROOT ?=
REPOSITORY ?=
JOBS ?=
BIN := .venv/bin

.PHONY: help venv reproduce test test-browser bench report publish lint lock colab notebook site clean
.DEFAULT_GOAL := help

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo 'Options: PROFILE=smoke|mini|photos|paper  ONLY=02,03  DATA_ROOT=DIR  PYTHON=python3.11'
	@echo '         JOBS=N: of reproduce, runs trained at once (as cores and memory allow); of test, test processes (2)'

venv: .venv/.installed  ## the environment in .venv, exactly as pinned

.venv/.installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11, 4))' || { \
	  echo 'This needs Python 3.11.4 or newer; name one: make PYTHON=/path/to/python3.11 ...' >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -r requirements.lock
	$(BIN)/python -m pip install --no-deps --no-build-isolation -e .
	@-git config filter.notebook.clean '.venv/bin/python -m mcar_lib.notebooks.clean' 2>/dev/null
	@touch $@

reproduce: venv  ## all notebooks, trained anew into results/local, then compared with the committed results
	$(BIN)/mcar reproduce --profile '$(PROFILE)' $(if $(ONLY),--only '$(ONLY)') $(if $(DATA_ROOT),--data-root '$(DATA_ROOT)') \
	  $(if $(JOBS),--jobs '$(JOBS)')

test: lint  ## every check: lint, tests, notebooks, drift of what they write
	$(BIN)/python -m pytest -n $(or $(JOBS),2) --dist loadfile --no-loadscope-reorder

test-browser: venv  ## the notebooks, the explorer and the site in Debian's chromium (apt-get install chromium)
	MCAR_BROWSER=1 $(BIN)/python -m pytest tests/browser

lint: venv  ## format, lint, types, layers and the CI workflow only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/zizmor --offline --quiet .github/workflows

lock:  ## maintainers: requirements.lock from pyproject.toml, with hashes; needs uv; UPGRADE=1 takes newer versions
	uv pip compile --universal --all-extras --python-version 3.11.4 --generate-hashes --no-header --no-annotate \
	  $(if $(UPGRADE),--upgrade) pyproject.toml -o requirements.lock

bench: venv  ## speed and memory into results/benchmarks and README: ONLY=startup,metrics; QUICK=1 only tries it
	$(BIN)/python benchmarks/run.py $(if $(ONLY),--only '$(ONLY)') $(if $(DATA_ROOT),--data-root '$(DATA_ROOT)') \
	  $(if $(QUICK),--quick)

report: venv  ## the notebooks run in place: tables, figures and README numbers from the committed records
	$(BIN)/mcar report

publish: venv  ## maintainers: results/local becomes the committed results
	$(BIN)/mcar publish --profile '$(PROFILE)'

colab: venv  ## maintainers: badges that open notebooks on Colab; REPOSITORY=https://github.com/OWNER/NAME
	$(BIN)/python -m mcar_lib.notebooks.colab '$(REPOSITORY)' 02 09

notebook: venv  ## JupyterLab on a start page that says what to click
	$(BIN)/jupyter-lab --config notebooks/.lab/jupyter_lab_config.py

site: venv  ## the executed notebooks and results as pages that open from disk: site/_build/html/index.html
	$(BIN)/sphinx-build -q -n -W --keep-going -b html -c site -d site/_build/doctrees . site/_build/html
	@echo 'open site/_build/html/index.html'

clean:  ## removes caches; environment, data, artifacts and results stay
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find mcar_lib tests benchmarks notebooks -name __pycache__ -prune -exec rm -rf {} +
