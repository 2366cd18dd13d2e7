# Everything starts from Python >= 3.11 and pip; `.venv` is made and filled when pyproject.toml or constraints.txt change.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CALLER := $(PWD)

# A relative CADDIE_HOME is the caller's, also under `make -C`.
IN_HOME := case "$$CADDIE_HOME" in ''|/*|'~'*) ;; *) export CADDIE_HOME="$(CALLER)/$$CADDIE_HOME" ;; esac;

.PHONY: demo ui test check clean help

help: ## what there is to make
	@sed -n 's/^\([a-z]*\):.*## /  make \1	/p' Makefile

demo: $(INSTALLED) ## a real study on this machine's CPU, to a record table and a report
	@$(IN_HOME) $(BIN)/caddie demo

ui: $(INSTALLED) ## MLflow's pages on what has been run
	@$(IN_HOME) $(BIN)/caddie ui

test: ARGS ?= -m "not slow"
test: WORKERS ?= 2
test: $(INSTALLED) ## the tests, a quarter of an hour; ARGS="-m slow" for whole studies, restarts, clusters and clean rooms
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

check: $(INSTALLED) ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean: ## remove what make and the tools made; runs and data stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version 2>&1)"; \
		  echo "hint: make PYTHON=/path/to/python3.12"; exit 8; } >&2
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	@touch $@
