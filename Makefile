# make quickstart   sets up .venv, trains a teacher and students on real digits, fine-tunes, exports and compares them
# make test         sets up .venv, then checks the style and runs the tests
# make env          sets up .venv alone

PYTHON ?= python3
BIN := .venv/bin

.PHONY: env quickstart test
env: .venv/installed

.venv/installed: setup.py pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --editable '.[demo,fast,test]'
	touch $@

quickstart: env
	$(BIN)/python tools/quickstart.py

test: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest
