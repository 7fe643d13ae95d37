# Every verb sets up what it needs: a virtual environment in .venv with the versions of requirements.lock, once.
#
#   make train    train a small SwitchAll on two CPU processes; again: resume it   (ARGS="--set run.steps=800" changes the config)
#   make test     the tests, on two workers                                        (ARGS="tests/train -k resume" chooses some;
#                                                                                   WORKERS=0: none, for ARGS=--pdb)
#   make check    format, lint, types, spelling, import rules
#   make fuzz     the property tests with many new examples
#   make drills   the long tests: kills, layouts, hangs (DRILLS_SEED=7 repeats those that began with it)
#   make clean    remove what the others made, except runs/
#
# PYTHON=python3.11 chooses the interpreter of a new .venv; PIP_ARGS is handed to pip (another index, a mirror, a folder of wheels).

PYTHON ?=
PIP_ARGS ?=
ARGS ?=
WORKERS ?= 2

BIN := .venv/bin
STAMP := .venv/installed
FITS := import sys; assert (3, 11) <= sys.version_info[:2] <= (3, 12)

# One thread per process: two processes then use two cores, and a run repeats its losses on a machine with more of them.
export OMP_NUM_THREADS ?= 1
# The small run and the tests are CPU work on every machine. A step's large tensors come and go: keeping their pages instead of handing
# them back to the kernel saved four fifths of the system time.
CPU := DS_ACCELERATOR=cpu MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1000000000000 MALLOC_TOP_PAD_=67108864

.PHONY: help train test check fuzz drills clean
help:
	@sed -n 's/^#   //p' Makefile

train: $(STAMP)
	$(BIN)/python -m data.prepare --out runs/shards --tokenizer bpe --vocab-size 4096
	@# A free port: DeepSpeed's default may belong to another run on this machine.
	$(CPU) $(BIN)/deepspeed --num_accelerators 2 --log_level error \
		--master_port $$($(BIN)/python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])') \
		launcher/main.py --config configs/tiny_cpu.yaml $(ARGS)

test: $(STAMP)
	@# A file stays on one worker, in the order of the folders: then the long ones do not come last.
	$(CPU) $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright
	$(BIN)/codespell
	$(BIN)/lint-imports

fuzz: $(STAMP)
	HYPOTHESIS_PROFILE=fuzz $(CPU) $(BIN)/python -m pytest -m hypothesis --timeout=3600 $(ARGS)

drills: $(STAMP)
	DRILLS_SEED=$${DRILLS_SEED:-$$(date +%s)} $(CPU) $(BIN)/python -m pytest -m slow --timeout=3600 $(ARGS)

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './runs/*' -type d -prune -exec rm -rf {} +
	@if [ -d runs ]; then echo "runs/ (shards, checkpoints, metrics) is left alone: remove it yourself if you mean to"; fi

# An interpreter is tried, not looked up: a version manager may list a python3.12 that does not run, a system may lack its venv.
$(STAMP): requirements.lock
	@if ! $(BIN)/python -c '$(FITS); import pip' 2>/dev/null; then \
		tried="$(or $(PYTHON),python3.12 python3.11 python3)"; found=; \
		for python in $$tried; do \
			if $$python -c '$(FITS); import venv, ensurepip' 2>/dev/null; then found=$$python; break; fi; \
		done; \
		if [ -z "$$found" ]; then \
			echo "error: Python 3.11 or 3.12 with its venv module is needed, but none of $$tried is that:" \
				"install one (on Debian also python3-venv), or name it with make PYTHON=/path/to/python3.12" >&2; \
			exit 1; \
		fi; \
		echo "making .venv with $$found"; $$found -m venv --clear .venv; \
	fi
	$(BIN)/python -m pip install --requirement requirements.lock $(PIP_ARGS)
	@touch $(STAMP)
