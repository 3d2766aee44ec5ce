# make figures   every figure and table of the reference profile (resumes what was interrupted)
# make test      style and tests
# make optimum   the yardstick in data/optimum anew: every set of layers; for a GPU
# make gpu       speed and memory at full size, in data/speed; for a GPU
# make verify    check models and corpora, rerun the smoke profile, compare with the committed values
# make hashes    the committed hashes of data/ anew, after a table was drawn again: commit data/SHA256SUMS with it
# make lab       the notebooks in JupyterLab
# make lock      resolve the dependencies anew
# make clean     remove the environment, build/ and caches; results, figures and data/runs stay
#
# Each target makes and reuses .venv. Variables: PYTHON=python3.12, CORES=8, PROFILE=profiles/paper.yaml, ARGS="--resources gpu=1"

PYTHON ?= python3
CORES ?= 2
PROFILE ?= profiles/reference.yaml
ARGS ?=
BIN := .venv/bin
READY := .venv/installed

# Runs and tests share the cores; threads inside one of them would only change the last digits of its sums.
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: figures optimum healing gpu test verify hashes lab lock clean
.DEFAULT_GOAL := figures

figures: $(READY)
	@$(BIN)/python -m prunelib.batch $(PROFILE) --cores $(CORES) $(ARGS)

optimum: $(READY)
	@$(BIN)/python -m prunelib.batch profiles/optimum.yaml --cores $(CORES) $(ARGS)

healing: $(READY)
	@$(BIN)/python -m prunelib.batch profiles/healing.yaml --cores $(CORES) $(ARGS)

gpu: $(READY)
	@$(BIN)/python -m prunelib.batch profiles/speed.yaml --cores $(CORES) $(ARGS)

test: $(READY)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check --quiet . && $(BIN)/python -m pytest $(ARGS)

verify: $(READY)
	@$(BIN)/python -m prunelib.verify $(ARGS)

hashes: $(READY)
	@$(BIN)/python -m prunelib.checksums --update

lab: $(READY)
	@$(BIN)/jupyter lab --notebook-dir notebooks $(ARGS)

# The version of torch is pinned without the `+cpu` of the wheel at hand: the lock serves CPU and GPU machines.
lock: $(READY)
	@$(BIN)/pip-compile -q --strip-extras --allow-unsafe --extra dev --extra cluster --constraint constraints.txt \
	  --no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-annotate --no-header \
	  -o requirements.lock pyproject.toml
	@sed -i.old 's/+cpu$$//' requirements.lock && rm requirements.lock.old

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
