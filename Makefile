# Two commands: `make demo` and `make test`. Each sets itself up in .venv/ on a machine that has Python 3.10 to 3.12 only.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LOCK := requirements/py311-linux-x86_64.lock
STACK ?= onedl

# The data set, scores or tree-crowns: the demo takes the scores unless it is named, the studies the tree crowns.
DATA ?=
STUDY_DATA := $(or $(DATA),tree-crowns)
ONE_THREAD := OMP_NUM_THREADS=1

.PHONY: demo study options frontier uptrain exports deployed-latency benchmarks gpu-check test test-slow test-stack stability lint docs setup data lock licences audit sbom dist check-dist hooks fuzz crash-test clean

demo: $(READY)
	$(BIN)/python tools/demo.py --data $(or $(DATA),scores)

# The demo over three seeds on the tree crowns: the table of docs/index.md.
study: $(READY) data
	$(BIN)/python tools/demo.py --data $(STUDY_DATA) --work-dir work_dirs/study --seeds 0 1 2

# Each option of the attention alone, three seeds: the table of docs/options.md. Two hours on two idle cores.
options: $(READY) data
	$(BIN)/python tools/study.py --data $(STUDY_DATA) \
	  --variants softmax linear published kernel image-conv uniform geometric ramp ramp-centered castling

# Accuracy at equal cost, docs/frontier.md: about three hours on two idle cores. `make frontier ARGS=--accuracy` may share
# the machine, `ARGS=--latency` after it may not.
frontier: $(READY) data
	$(BIN)/python tools/frontier.py $(ARGS)
	$(BIN)/python tools/frontier.py --data tree-crowns $(ARGS)
	$(BIN)/python tools/dev/tables.py

# The study's softmax detectors become linear ones in a quarter of their iterations.
uptrain: study
	$(BIN)/python tools/uptrain.py --data $(STUDY_DATA) --distill

# mAP of exported files of an uptrained ViT and of the LeViT beside PyTorch's; and the latency of a ViT-S in each runtime.
VIT := configs/castling_vit/gfl_castling-vit-nano_deploy-from-softmax_tree-crowns.py work_dirs/uptraining/seed0/deploy/deploy.pth
LEVIT := configs/castling_levit/picodet_castling-levit-128s_deploy_tree-crowns.py work_dirs/levit/seed0/deploy/deploy.pth
DEPLOYED := $(BIN)/python tools/benchmarks/deployed.py
exports: uptrain
	$(BIN)/python tools/demo.py --model castling_levit/picodet_castling-levit-128s --work-dir work_dirs/levit
	for precision in float32 float16 int8; do \
	  $(BIN)/python tools/export_onnx.py $(VIT) work_dirs/exports/vit_$$precision.onnx --precision $$precision && \
	  $(BIN)/python tools/export_onnx.py $(LEVIT) work_dirs/exports/levit_$$precision.onnx --precision $$precision || exit 1; \
	done
	$(DEPLOYED) accuracy $(VIT) work_dirs/exports/vit_*.onnx --out results/deployment/vit
	$(DEPLOYED) accuracy $(LEVIT) work_dirs/exports/levit_*.onnx --out results/deployment/levit
deployed-latency: $(READY)
	for head in gfl retinanet; do \
	  $(DEPLOYED) attentions configs/castling_vit/$${head}_castling-vit-s_deploy_8xb2-1x_coco.py \
	    --out results/deployment/$${head}_castling-vit-s || exit 1; \
	done

# The records of docs/attention.md: about half an hour on two idle cores, and nothing else may run beside it.
BENCHMARK := $(BIN)/python tools/benchmark.py --threads 2
benchmarks: $(READY)
	$(BENCHMARK) --levels core --sizes 16 32 64 128 --variants softmax linear published floor --passes forward \
	  --out results/attention/core
	$(BENCHMARK) --levels core --sizes 16 32 64 --variants softmax linear published --passes forward+backward \
	  --out results/attention/training
	$(BENCHMARK) --levels core --sizes 64 --batch 2 --variants softmax linear castling castling_empty dense \
	  --passes forward+backward --out results/attention/hybrid
	$(BENCHMARK) --levels core --sizes 64 --batch 2 --variants linear castling_empty --passes forward+backward --seconds 60 \
	  --out results/attention/empty
	$(BENCHMARK) --levels backbone --image-sizes 512 1024 --variants softmax linear published --passes forward \
	  --out results/attention/backbone
	$(BIN)/python -m tools.benchmarks.numerics --out results/attention/numerics.json
	$(BIN)/python tools/dev/tables.py

# On a machine with a GPU: parity, times and memory, results/gpu/NAME.json. `make gpu-check ARGS=--dry-run` needs none.
gpu-check: $(READY)
	$(BIN)/python -m tools.benchmarks.gpu --name $(or $(NAME),gpu) $(ARGS)
	$(BIN)/python tools/dev/tables.py

# Two workers of one thread each: faster than one of two, and a busy machine slows it less.
test: lint data
	$(ONE_THREAD) $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow"

# What takes longer: exports of every family, the tutorial, installing into a fresh environment.
test-slow: $(READY) data
	$(ONE_THREAD) $(BIN)/python -m pytest -q -n 2 --dist loadfile -m slow --timeout 3600

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

# The pages under docs/, into work_dirs/site/; a warning is an error, which --quiet would hide. `make test` builds them too.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# 2000 iterations in bfloat16 and in float16, for results/stability/: a quarter of an hour each on an idle core. Most CPUs
# emulate float16, so it takes one image at a time.
stability: $(READY) data
	$(BIN)/python tools/dev/stability.py
	$(BIN)/python tools/dev/stability.py --precision fp16 --batch-size 1

# The suite on another stack, in .venv-STACK/: onedl, upstream, oldest, newest; PYTEST="..." is handed to pytest.
test-stack: data
	$(PYTHON) tools/dev/test_stack.py $(STACK) --record results/stacks/$(STACK).json --pytest="$(PYTEST)"

# Exact files with hashes of what the pins say. No index is recorded: hashes are the same wherever a file comes from.
TOOLS := .venv-tools/bin
UV_LOCK := $(TOOLS)/uv pip compile --no-config --no-python-downloads --no-header --no-annotate --no-emit-index-url \
  --generate-hashes --python-version 3.11.5 --python-platform x86_64-manylinux_2_28
lock: $(TOOLS)/.ready
	$(UV_LOCK) requirements/default.txt --quiet --output-file $(LOCK).new
	printf '# Linux, x86-64, Python 3.11 from 3.11.5 on; written by make lock from default.txt and constraints.txt.\n\n' \
	  | cat - $(LOCK).new > $(LOCK)
	rm $(LOCK).new
	$(UV_LOCK) requirements/build.txt --quiet --output-file requirements/build.lock

licences: $(READY)
	$(BIN)/python tools/dev/licences.py

# --strict: a package that the vulnerability service does not answer for is an error, not a clean bill.
audit: $(TOOLS)/.ready
	$(TOOLS)/pip-audit --strict --require-hashes --disable-pip --requirement $(LOCK)

sbom: $(TOOLS)/.ready
	mkdir -p build
	$(TOOLS)/cyclonedx-py requirements $(LOCK) --output-format JSON --output-reproducible --output-file build/sbom.json

# Wheel and sdist, each built twice and compared.
dist: $(READY)
	$(BIN)/python tools/dev/build_dist.py

# What a package index would refuse or not render, and a wheel that has become large.
check-dist: dist $(TOOLS)/.ready
	$(TOOLS)/twine check --strict dist/*
	test -z "$$(find dist -name '*.whl' -size +3000k)"

# Ruff and mypy before every commit.
hooks: $(READY) $(TOOLS)/.ready
	$(TOOLS)/pre-commit install

# Nightly: the records of docs/robustness.md. A hundred thousand files that nobody trusts, and sixty kills.
FUZZ := $(BIN)/python -W ignore -m tests.robustness.fuzz
fuzz: $(READY)
	$(ONE_THREAD) $(FUZZ) --cases 100000 --out results/robustness/fuzz.json
	$(BIN)/python tools/dev/tables.py

# Needs a trained demo or study for all of its commands; without one, data preparation and training alone.
crash-test: $(READY) data
	$(ONE_THREAD) $(BIN)/python -W ignore -m tests.robustness.crashes --kills 60 --out results/robustness/crashes.json
	$(BIN)/python tools/dev/tables.py

setup: $(READY)

data: $(READY)
	$(BIN)/python tools/dataset_converters/tree_crowns.py

# The lock where it applies, with a hash for every file; other Pythons and machines install the pins.
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check
$(READY): requirements/default.txt requirements/build.lock $(LOCK) setup.cfg setup.py pyproject.toml castling_det.pth
	$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12) and "Python 3.10 to 3.12 is needed, this is " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	if $(BIN)/python -c 'import platform, sys; v = sys.version_info; sys.exit(not (v[:2] == (3, 11) and v >= (3, 11, 5) \
	  and sys.platform == "linux" and platform.machine() == "x86_64" and platform.libc_ver()[0] == "glibc"))'; then \
	  $(PIP) --no-deps --require-hashes -r requirements/build.lock && \
	  $(PIP) --no-deps --require-hashes --no-build-isolation -r $(LOCK); \
	else \
	  $(PIP) "setuptools==80.9.0" wheel && $(PIP) -r requirements/default.txt; \
	fi
	$(PIP) --no-deps --no-build-isolation --editable .
	touch $@

$(TOOLS)/.ready: requirements/tools.txt
	$(PYTHON) -m venv .venv-tools
	$(TOOLS)/python -m pip install --quiet --disable-pip-version-check -r requirements/tools.txt
	touch $@

clean:
	rm -rf $(VENV) .venv-* work_dirs build dist *.egg-info
