# make quickstart   sets up .venv, trains a teacher and students on real digits, fine-tunes, exports and compares them
# make test         sets up .venv, then checks style and types and runs the tests that inject no faults
# make test-faults  runs the tests that do: kills, signals, full disks, hostile files, fuzzing
# make docs         writes the pages that come from the code, and builds the site of docs/ in site/
# make docs-commands  runs the commands of README.md and docs/ on tiny images
# make env          sets up .venv alone

PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder # a file on one process, for its fixtures

.PHONY: docs docs-commands env messages quickstart test test-faults
env: .venv/installed

.venv/installed: setup.py pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --no-compile --editable '.[demo,fast,test]'
	$(BIN)/python -m compileall -q -j 0 .venv/lib > .venv/compiled || true # on all cores, where pip takes one; some files are of other Pythons
	touch $@

quickstart: env
	$(BIN)/maedistill quickstart

test: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) -m "not faults"

test-faults: env
	$(PYTEST) -m faults

docs: env .venv/docs
	$(BIN)/python tools/make_docs.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-commands: env
	$(BIN)/python -m tests.docs_commands

.venv/docs: pyproject.toml .venv/installed
	$(BIN)/pip install --editable '.[docs]'
	touch $@

messages: env
	$(BIN)/python -m pytest --rewrite-messages tests/config/test_bad_configs.py
	git diff --stat tests/golden/messages.txt
