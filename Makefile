# make quickstart   the main job on this machine, from nothing to a report
# make test         the tests; make test-all adds the slow drills
SHELL := /bin/bash
PY := .venv/bin/python
PYTHON ?= python3
LOCK := requirements.lock
export HF_HUB_OFFLINE := 1
export RAY_USAGE_STATS_ENABLED := 0
# the sources are compiled once, not by each of some hundred processes
unexport PYTHONDONTWRITEBYTECODE
# the quickstart and the tests are CPU work, also where there is a GPU
ON_CPU := CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu OMP_NUM_THREADS=1

.PHONY: quickstart setup lock lint test test-all bench reproduce-toy clean

quickstart: setup
	@$(ON_CPU) .venv/bin/glipv2 run infra/recipes/quickstart.yaml

reproduce-toy: setup
	@$(ON_CPU) $(PY) infra/reproduce_toy.py

setup: .venv/ready

# uv resolves in seconds; byte-compiling saves 15 s at every later start
.venv/ready: $(LOCK) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' \
	  || { echo "Python 3.10, 3.11 or 3.12 is needed; set PYTHON=python3.11"; exit 2; }
	@test -x $(PY) || $(PYTHON) -m venv .venv
	@$(PY) -m pip install -q --disable-pip-version-check uv==0.13.9
	@.venv/bin/uv pip install -q --compile-bytecode --python $(PY) -r $(LOCK)
	@.venv/bin/uv pip install -q --no-deps --python $(PY) -e .
	@touch $@

lock: setup
	@.venv/bin/uv pip compile -q --universal --python-version 3.10 --extra dev --no-header pyproject.toml -o .lock.new
	@{ echo "# Every package at one version for Python 3.10 to 3.12. Refresh: make lock"; cat .lock.new; } > $(LOCK)
	@rm .lock.new

lint: setup
	@mkdir -p .types/glipv2 && for d in model pipeline data_prep eval jobs; do \
	  ln -sfn ../../$$d .types/glipv2/$$d; done
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

test: setup
	$(ON_CPU) .venv/bin/pytest -n 3 --dist loadfile --no-loadscope-reorder -m "not slow and not gpu"

test-all: setup
	$(ON_CPU) .venv/bin/pytest -m "not gpu"

bench: setup
	$(ON_CPU) PYTHONPATH=tests $(PY) infra/bench.py $(if $(FLICKR30K),--flickr30k $(FLICKR30K))

clean:
	rm -rf .venv .types runs build *.egg-info
