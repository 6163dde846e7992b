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

# Speed of the trunks on this machine; about 15 minutes on two cores.
BENCH = "$(VENV)/bin/python" tools/benchmark.py --modes dense,dense-rect,packed,apt --keep 1.0 0.7 0.5 --stages
bench: setup
	$(BENCH) det_configs/eva02_b_apt_1536.py --img-size 1024 --num-images 2 --rounds 3 \
		--json docs/benchmarks/det_b_1024.json --plot docs/benchmarks/speed_1024.png
	$(BENCH) det_configs/eva02_b_apt_1536.py --num-images 1 --rounds 2 \
		--json docs/benchmarks/det_b_1536.json --plot docs/benchmarks/speed_1536.png
	$(BENCH) seg_configs/eva02_l_apt_512.py --num-images 2 --rounds 3 \
		--json docs/benchmarks/seg_l_512.json --plot docs/benchmarks/speed_512.png
