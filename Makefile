# `make test` and `make demo` each work on a fresh machine: they set up their own environment first.
# VENV names the environment; point several checkouts at one to share it.
VENV ?= .venv
PYTEST_ARGS ?=

.PHONY: setup test test-slow lint format tables docs-check demo bench
.DEFAULT_GOAL := test

setup:
	@tools/setup_env.sh "$(VENV)"

# In up to four processes of one thread each, a file's tests in one of them.
test: setup lint
	OMP_NUM_THREADS=1 "$(VENV)/bin/python" -m pytest -n auto --maxprocesses 4 --dist loadfile $(PYTEST_ARGS)

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

# A dense model becomes adaptive, and a page shows what that gives. TASK=vit takes pretrained weights: WEIGHTS=FILE, or
# timm's (downloaded, unless the hub's cache has them); det, seg and llava take small models that are shipped.
WEIGHTS ?=
CACHED := $(wildcard $(HOME)/.cache/huggingface/hub/models--timm--vit_small_patch14_dinov2*)
TASK ?= $(if $(WEIGHTS)$(CACHED),vit,det)
demo: setup $(if $(filter llava,$(TASK)),data/photoshapes_big) $(if $(filter det seg,$(TASK)),data/photoshapes)
ifeq ($(TASK),vit)
	"$(VENV)/bin/python" examples/demo_vit.py $(if $(WEIGHTS),--weights "$(WEIGHTS)")
else
	"$(VENV)/bin/python" examples/demo.py $(TASK)
endif

data/photoshapes: | setup
	"$(VENV)/bin/python" examples/make_photoshapes.py $@

# Large objects, and many images: from these even a small model learns shapes in half an hour.
data/photoshapes_big: | setup
	"$(VENV)/bin/python" examples/make_photoshapes.py $@ --train 8000 --val 400 --size 192 --min-diameter 0.2

# Speed on this machine: about 20 minutes on two cores, under 10 on an H200. BENCH_ARGS: see benchmarks/run_all.py --help.
BENCH_ARGS ?=
bench: setup
	"$(VENV)/bin/python" benchmarks/run_all.py $(BENCH_ARGS)
