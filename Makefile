# `make test` and `make demo` each work on a fresh machine: they set up their own environment first.
# VENV names the environment; point several checkouts at one to share it.
VENV ?= .venv
PYTEST_ARGS ?=

.PHONY: setup test test-slow lint format clean
.DEFAULT_GOAL := test

setup:
	@tools/setup_env.sh "$(VENV)"

test: setup lint
	"$(VENV)/bin/python" -m pytest $(PYTEST_ARGS)

test-slow: setup
	"$(VENV)/bin/python" -m pytest -m "slow and not gpu" $(PYTEST_ARGS)

lint: setup
	"$(VENV)/bin/ruff" check .
	"$(VENV)/bin/ruff" format --check .

format: setup
	"$(VENV)/bin/ruff" check --fix .
	"$(VENV)/bin/ruff" format .
