# `make test` and `make demo` each work on a fresh machine: they set up their own environment first.
# VENV names the environment; point several checkouts at one to share it.
VENV ?= .venv
PYTEST_ARGS ?=

.PHONY: setup test test-slow lint format demo bench
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

# Short fine-tune of a small dense model that is shipped, and its comparison with the dense model; TASK=det or seg.
TASK ?= det
demo: setup data/photoshapes
	"$(VENV)/bin/python" tools/photoshapes_results.py $(TASK) --out work_dirs/demo \
		--dense $(TASK)_configs/checkpoints/eva02_tiny_dense_photoshapes.safetensors
	@echo "Table: work_dirs/demo/photoshapes_$(TASK).md. Next: README.md, 'Your own checkpoint'."

data/photoshapes:
	"$(VENV)/bin/python" tools/make_photoshapes.py $@

# Speed on this machine: about 25 minutes on two cores, under 10 on an H200. BENCH_ARGS: see tools/bench_all.py --help.
BENCH_ARGS ?=
bench: setup
	"$(VENV)/bin/python" tools/bench_all.py $(BENCH_ARGS)
