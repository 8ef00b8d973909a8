# Two commands, and nothing before them: `make demo` and `make test`.

SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO := runs/demo
# Ranks that wait for each other give their core free instead of spinning.
export OMP_WAIT_POLICY := PASSIVE
# The memory of a tensor is kept for the next one, in huge pages: a step on a CPU takes a tenth less than with pages that
# the kernel gives and takes back each time.
export GLIBC_TUNABLES := glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=4294967296:glibc.malloc.hugetlb=1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test test-fast test-slurm check format clean

help:
	@echo 'make demo       install into $(VENV), pretrain a small BridgeTower on emoji, evaluate it, write $(DEMO)/report.html'
	@echo 'make test       install into $(VENV), run the whole test suite'
	@echo 'make test-fast  the tests that take less than a minute each'
	@echo 'make test-slurm the job scripts on a real Slurm, which it installs (as root, on Debian or Ubuntu)'
	@echo 'make check      ruff and mypy'
	@echo 'make format     let ruff lay the code out'
	@echo 'make clean      remove $(VENV), runs and shards of the demo'

# Not compiled: of 20,000 files a run imports a fifth, and Python compiles those when it does.
$(INSTALLED): setup.py requirements-demo.txt bridgetower/__init__.py
	@set -e; \
	python=$$(sh .ci/check_machine.sh); \
	echo "Installing into $(VENV) (one to four minutes) ..."; \
	"$$python" -m venv $(VENV); \
	$(BIN)/pip install -qq --no-compile --require-hashes --no-deps -r requirements-demo.txt; \
	$(BIN)/pip install -qq --no-compile -e '.[demo,dev]'; \
	touch $@

demo: $(INSTALLED)
	@set -e; \
	ranks=$$($(BIN)/python -c 'import torch; print(min(2, torch.cuda.device_count()) or 2)'); \
	port=$$($(BIN)/python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'); \
	$(BIN)/python -c 'import torch; raise SystemExit(not torch.cuda.is_available())' || export DS_ACCELERATOR=cpu; \
	$(BIN)/python data_prep/build_shards.py emoji --out=shards/emoji; \
	$(BIN)/deepspeed --log_level error --num_gpus "$$ranks" --master_port "$$port" \
	    pretrain/train.py tiny --name=$(notdir $(DEMO)) --run_root=$(dir $(DEMO)); \
	$(BIN)/python pretrain/report.py $(DEMO)

# Two files at a time: most of a test's time is one core's work. A file's tests share what they have built.
test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-fast: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not slow'

# A real Slurm of two nodes on this machine, as root: installs Debian's packages if they are not there.
test-slurm: $(INSTALLED)
	$(BIN)/python -m pytest tests/slurm

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(DEMO) shards/emoji
