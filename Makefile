# Two commands are enough: `make demo` and `make test`.

SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO := runs/demo
# Ranks that wait for each other leave their core idle instead of spinning.
export OMP_WAIT_POLICY := PASSIVE
# glibc keeps freed memory for the next tensor, in huge pages. A step on a CPU then takes a tenth less time than when the
# kernel hands out and takes back the pages of each tensor.
export GLIBC_TUNABLES := glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=4294967296:glibc.malloc.hugetlb=1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Container images often set it. Python then keeps no bytecode, and every process compiles thousands of files anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test test-fast test-slurm check format clean

help:
	@echo 'make demo       install into $(VENV), pretrain a small BridgeTower on emoji, evaluate it, write $(DEMO)/report.html'
	@echo 'make test       install into $(VENV), run the whole test suite'
	@echo 'make test-fast  run the tests that take less than a minute each'
	@echo 'make test-slurm install Slurm (as root, on Debian or Ubuntu) and run the job scripts on it'
	@echo 'make check      run ruff and mypy'
	@echo 'make format     format the code with ruff'
	@echo 'make clean      remove $(VENV), and the run and shards of the demo'

# pip compiles nothing: of 20,000 files a run imports a quarter, which are compiled afterwards, on all cores.
$(INSTALLED): setup.py requirements-demo.txt bridgetower/__init__.py
	@set -e; \
	python=$$(sh .ci/check_machine.sh); \
	echo "Installing into $(VENV) (one to four minutes) ..."; \
	"$$python" -m venv $(VENV); \
	$(BIN)/pip install -qq --no-compile --require-hashes --no-deps -r requirements-demo.txt; \
	$(BIN)/pip install -qq --no-compile -e '.[demo,dev]'; \
	$(BIN)/python .ci/compile_imports.py; \
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

# Two test files run at a time, because most tests keep one core busy. The tests of a file share what they have built.
test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-fast: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not slow'

# Starts a real Slurm of two nodes on this machine. As root; installs Debian's packages if they are missing.
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
