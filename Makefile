# make figures   every figure and table of the reference profile (resumes what was interrupted)
# make test      style and tests
# make optimum   the yardstick in data/optimum anew: every set of layers; for a GPU
# make gpu       speed and memory at full size, in data/speed and data/benchmarks; for a GPU (one benchmark: two)
# make verify    check models and corpora, rerun the smoke profile, compare with the committed values
# make hashes    the committed hashes of data/ anew, after a table was drawn again: commit data/SHA256SUMS with it
# make audit     known weaknesses of the locked packages (pip-audit; needs PyPI itself), nothing pickled, hashes, licences
# make sbom      the inventory sbom.cdx.json and the licences in data/README.md anew, after the lock has changed
# make report    one page of everything, build/report/report.html, and the same as PDF where a browser is installed
# make lab       the notebooks in JupyterLab (as root, in a container: ARGS=--allow-root)
# make lock      resolve the dependencies anew
# make walkthrough  how long all this takes from a fresh clone: data/benchmarks/walkthrough.json (an idle machine, 70 minutes)
# make clean     remove the environment, build/ and caches; results, figures and data/runs stay
#
# Each target makes and reuses .venv (walkthrough: that of its clone). Variables: PYTHON=python3.12, CORES=8, PROFILE=profiles/paper.yaml, ARGS="--resources gpu=1"

PYTHON ?= python3
CORES ?= 2
PROFILE ?= profiles/reference.yaml
ARGS ?=
BIN := .venv/bin
READY := .venv/installed

# Runs and tests share the cores; threads inside one of them would only change the last digits of its sums.
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: figures optimum healing gpu test verify hashes audit sbom report lab lock walkthrough clean
.DEFAULT_GOAL := figures

figures: $(READY)
	@$(BIN)/python -m prunelib.lab.batch $(PROFILE) --cores $(CORES) $(ARGS)

optimum: $(READY)
	@$(BIN)/python -m prunelib.lab.batch profiles/optimum.yaml --cores $(CORES) $(ARGS)

healing: $(READY)
	@$(BIN)/python -m prunelib.lab.batch profiles/healing.yaml --cores $(CORES) $(ARGS)

gpu: $(READY)
	@$(BIN)/python -m prunelib.lab.batch profiles/speed.yaml --cores $(CORES) $(ARGS)
	@$(BIN)/python benchmarks/statistics_cost.py --shape llama-3-8b --device cuda --dtype bfloat16 --samples 16 \
	  --seq-len 2048 --batch-size 8 --output data/benchmarks/statistics_8b.json
	@$(BIN)/python benchmarks/slicing_cost.py --shape llama-2-7b --device cuda --threads 8 \
	  --output data/benchmarks/slicing_7b.json
	@$(BIN)/python benchmarks/streaming_cost.py --make build/llama-3-8b --shape llama-3-8b --device cuda
	@$(BIN)/python benchmarks/streaming_cost.py build/llama-3-8b --device cuda --threads 8 --dtype bfloat16 \
	  --batch-size 4 --device-limit 4 --windows-at-once 32 --output data/benchmarks/streaming_8b.json
	@$(BIN)/python benchmarks/search_cost.py --shape llama-3.1-8b --device cuda --dtype bfloat16 --windows 4 --seq-len 512 \
	  --batch-size 4 --together 4 --only naive shared "shared, together" --output data/benchmarks/search_8b_long.json
	@$(BIN)/python benchmarks/search_cost.py --shape llama-3.1-8b --device cuda --dtype bfloat16 --windows 8 --seq-len 128 \
	  --batch-size 2 --together 16 --only naive "shared, together" "shared, together, stopped" "kl: shared, together" \
	  "kl: shared, together, stopped" --output data/benchmarks/search_8b_short.json
	@if [ "$$(nvidia-smi -L | wc -l)" -lt 2 ]; then echo "healing_scaling.json wants two GPUs: left as it was"; else \
	  $(BIN)/python benchmarks/healing_scaling.py --shape 1b --device cuda --dtype bfloat16 --batch 32 --tokens 512 \
	  --micro-batch 8 --steps 10 100 --output data/benchmarks/healing_scaling.json; fi

# One file at a time in each process: what the tests of a file share is made once. Those that use all cores themselves come last.
test: $(READY)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check --quiet . && \
	  $(BIN)/python -m pytest --numprocesses $(CORES) --dist loadfile --durations 15 $(ARGS)

verify: $(READY)
	@$(BIN)/python -m prunelib.lab.verify $(ARGS)

hashes: $(READY)
	@$(BIN)/python -m prunelib.lab.checksums --update

audit: $(READY)
	@$(BIN)/python -m prunelib.lab.supply $(ARGS)

sbom: $(READY)
	@$(BIN)/python -m prunelib.lab.supply --update

report: $(READY)
	@$(BIN)/python -m prunelib.apps.report $(ARGS)

lab: $(READY)
	@$(BIN)/jupyter lab --notebook-dir notebooks $(ARGS)

# The version of torch is pinned without the `+cpu` of the wheel at hand: the lock serves CPU and GPU machines. That is also
# why it holds no hashes: torch's wheels differ from index to index, and pip wants hashes of all packages or of none.
# The tools of `make audit` live in an environment of their own: they need newer versions than the lock may take.
COMPILE = $(BIN)/pip-compile -q --strip-extras --allow-unsafe --no-emit-index-url --no-emit-find-links --no-emit-trusted-host \
  --no-annotate --no-header
lock: $(READY)
	@$(COMPILE) --extra dev --extra cluster --constraint constraints.txt -o requirements.lock pyproject.toml
	@sed -i.old 's/+cpu$$//' requirements.lock && rm requirements.lock.old
	@printf '%s\n' pip-audit 'cyclonedx-python-lib[json-validation]' | $(COMPILE) -o requirements-audit.lock -

walkthrough:
	@$(PYTHON) benchmarks/walkthrough.py --cores $(CORES) $(ARGS)

clean:
	rm -rf .venv build .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --clear: an environment that a changed lock or an interrupted installation left half done is made anew.
$(READY): requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11, 5) and "Python 3.11.5 or later is needed, $(PYTHON) is " + sys.version.split()[0] + "; try make PYTHON=python3.12")'
	@echo "installing requirements.lock into .venv (some minutes, once)"
	@$(PYTHON) -m venv --clear .venv
	@$(BIN)/python -m pip install -qq -r requirements.lock
	@$(BIN)/python -m pip install -qq --no-deps --no-build-isolation -e .
	@touch $@
