# `make test` and `make demo` each work on a fresh machine: they set up their own environment first.
# VENV names the environment; point several checkouts at one to share it.
VENV ?= .venv
PYTEST_ARGS ?=

.PHONY: setup test test-slow lint format tables docs-check demo bench
.DEFAULT_GOAL := test

setup:
	@tools/setup_env.sh "$(VENV)"

test: setup lint
	"$(VENV)/bin/python" -m pytest $(PYTEST_ARGS)

test-slow: setup
	"$(VENV)/bin/python" -m pytest -m "slow and not gpu" $(PYTEST_ARGS)

# Every command of README.md and the other documents, small enough for a CPU (tests/docs_table.py).
docs-check: setup
	"$(VENV)/bin/python" -m tests.check_docs

# The READMEs' results tables, from docs/results and docs/benchmarks.
tables: setup
	"$(VENV)/bin/python" benchmarks/update_tables.py

lint: setup
	"$(VENV)/bin/ruff" check .
	"$(VENV)/bin/ruff" format --check .

format: setup
	"$(VENV)/bin/ruff" check --fix .
	"$(VENV)/bin/ruff" format .

# A small dense model that is shipped becomes an APT, and a page shows what that gives; TASK=det, seg or llava. It
# resumes when interrupted.
TASK ?= det
demo: setup $(if $(filter llava,$(TASK)),data/photoshapes_big,data/photoshapes)
	"$(VENV)/bin/python" examples/demo.py $(TASK)

data/photoshapes:
	"$(VENV)/bin/python" examples/make_photoshapes.py $@

# Large objects, and many images: from these even a small model learns shapes in half an hour.
data/photoshapes_big:
	"$(VENV)/bin/python" examples/make_photoshapes.py $@ --train 8000 --val 400 --size 192 --min-diameter 0.2

# Speed on this machine: about 20 minutes on two cores, under 10 on an H200. BENCH_ARGS: see benchmarks/run_all.py --help.
BENCH_ARGS ?=
bench: setup
	"$(VENV)/bin/python" benchmarks/run_all.py $(BENCH_ARGS)
