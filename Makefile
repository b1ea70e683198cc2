# make quickstart   sets up .venv, then trains a teacher and three students on real digits, and writes a report
# make test         sets up .venv, then checks the style and runs the tests
# make env          sets up .venv alone

PYTHON ?= python3
BIN := .venv/bin

.PHONY: env quickstart test
env: .venv/installed

.venv/installed: setup.py pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --editable '.[demo,test]'
	touch $@

quickstart: env
	$(BIN)/python tools/quickstart.py

test: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest
