# setup: virtual environment in .venv; demo: the whole path on synthetic data; test: lint, format, tests;
# test-slow: those that take minutes; test-gpu: those for a GPU.
# Needs Linux, Python 3.10 to 3.12 and make; uv is installed into the environment if it is not on PATH.
# LOCK=requirements-torch2.11.lock: the stack for GPUs of docs/running.md (after make clean, where there is another).

SHELL := /bin/bash
PYTHON ?= $(shell for p in python3.12 python3.11 python3.10 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
UV := $(or $(shell command -v uv),$(BIN)/uv)
LOCK ?= $(or $(shell cat .venv/.installed 2>/dev/null),requirements.lock)
DEMO := data/demo

.PHONY: setup demo test test-slow test-gpu lint lock clean

setup: .venv/.installed

.venv/.installed: $(LOCK) pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no Python 3.10, 3.11 or 3.12 on PATH; set PYTHON=..." >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	test -x $(UV) || $(BIN)/python -m pip install --quiet uv
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --compile-bytecode -r $(LOCK)
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --editable .
	echo $(LOCK) > $@

demo: setup
	rm -rf $(DEMO) runs/demo
	$(BIN)/python tools/sample_data.py $(DEMO)/raw
	$(BIN)/python tools/convert.py --clusters $(DEMO)/raw/train_clusters.parquet \
		--sequences $(DEMO)/raw/train.db --out $(DEMO)/shards --split train
	$(BIN)/python tools/convert.py --clusters $(DEMO)/raw/valid_clusters.parquet \
		--sequences $(DEMO)/raw/validation.db --out $(DEMO)/shards --split valid
	$(BIN)/composer train.py yamls/demo.yaml
	$(BIN)/python tools/evaluate.py runs/demo/checkpoints/latest-rank0.pt --data $(DEMO)/shards
	$(BIN)/python tools/export_hf.py runs/demo/checkpoints/latest-rank0.pt runs/demo/hugging_face
	@echo
	@$(BIN)/python tools/plot_convergence.py runs/demo/tensorboard --data $(DEMO)/shards \
		--out runs/demo/perplexity.png
	@echo "shards: $(DEMO)/shards"
	@echo "checkpoints: runs/demo/checkpoints"
	@echo "model for transformers: runs/demo/hugging_face"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadgroup --max-worker-restart 0 -m "not slow and not gpu"

test-slow: lint
	$(BIN)/python -m pytest -n 1 --max-worker-restart 0 -m slow

test-gpu: setup
	@$(BIN)/python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "error: torch sees no GPU")'
	$(BIN)/python -m pytest -m gpu

# Pins for Python 3.10 to 3.12. Composer 0.32.1 asks for a torch below 2.7.1
# and runs with 2.11 as well.
COMPILE := $(UV) pip compile --quiet --universal --python-version 3.10 --extra dev --no-header --no-annotate \
	--no-emit-index-url pyproject.toml

lock:
	$(COMPILE) --output-file requirements.lock
	$(COMPILE) --output-file requirements-torch2.11.lock \
		--override <(printf '%s\n' torch==2.11.0 torchvision==0.26.0 torchao==0.18.0)

clean:
	rm -rf .venv $(DEMO) runs/demo
