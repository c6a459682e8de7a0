# Two commands: `make demo` and `make test`. Each sets itself up in .venv/ on a machine that has Python 3.10 to 3.12 only.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo study uptrain benchmarks test lint docs setup data clean

demo: $(READY) data
	$(BIN)/python tools/demo.py

# The demo over three seeds: the table of the README.
study: $(READY) data
	$(BIN)/python tools/demo.py --work-dir work_dirs/study --seeds 0 1 2

# The study's softmax detectors become linear ones in a quarter of their iterations.
uptrain: study
	$(BIN)/python tools/uptrain.py

# The records of docs/attention.md: about half an hour on two idle cores, and nothing else may run beside it.
BENCHMARK := $(BIN)/python tools/benchmark.py --threads 2
benchmarks: $(READY)
	$(BIN)/castling-det build
	$(BENCHMARK) --levels core --sizes 16 32 64 128 \
	  --variants softmax linear linear_native linear_compiled published floor \
	  --passes forward --out results/attention/core
	$(BENCHMARK) --levels core --sizes 16 32 64 --variants softmax linear published --passes forward+backward \
	  --out results/attention/training
	$(BENCHMARK) --levels core --sizes 64 --batch 2 --variants softmax linear castling castling_empty dense \
	  --passes forward+backward --repeats 7 --max-seconds 300 --out results/attention/hybrid
	$(BENCHMARK) --levels backbone --image-sizes 512 1024 --variants softmax linear linear_native published --passes forward \
	  --repeats 7 --out results/attention/backbone
	$(BIN)/python tools/numerics.py --out results/attention/numerics.json
	$(BIN)/python tools/update_tables.py

# Two workers of one thread each: faster than one of two, and a busy machine slows it less.
test: lint data
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

# The pages under docs/, into work_dirs/site/; a warning is an error, which --quiet would hide. `make test` builds them too.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

setup: $(READY)

data: $(READY)
	$(BIN)/python tools/prepare_tree_crowns.py

$(READY): requirements/default.txt setup.cfg setup.py pyproject.toml castling_det.pth
	$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12) and "Python 3.10 to 3.12 is needed, this is " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "setuptools==80.9.0" wheel
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/default.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

clean:
	rm -rf $(VENV) work_dirs build dist *.egg-info
