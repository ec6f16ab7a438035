# `make repro` runs the main job, `make test` the tests; each works alone on a fresh clone.
PYTHON ?= python3
BIN := .venv/bin
export DVC_NO_ANALYTICS := 1
export PATH := $(CURDIR)/$(BIN):$(PATH)

# Of `make fuzz`: how many files.
INPUTS ?= 20000
# Of `make worker`: how many workers; or the GPU that one worker of a CUDA image gets. PROJECT is where they compute.
WORKERS ?= 1
GPU ?=
PROJECT ?= $(CURDIR)
COMPOSE = DMAT_USER=$$(id -u):$$(id -g) DMAT_PROJECT=$(PROJECT) docker compose

.PHONY: repro smoke test test-slow test-gpu test-services test-robustbench fuzz torture check ui up worker down clean-env

repro: .venv/ready
	$(BIN)/dmat doctor --fix
	$(BIN)/dmat lock --check
	$(BIN)/dmat repro; status=$$?; $(BIN)/dmat runs sync; exit $$status
	@cat artifacts/write_report/report/table.md
	@echo "The whole comparison: artifacts/write_report/report/report.html; every run: make ui"

# Every stage with tiny sizes, in a folder of its own.
smoke: .venv/ready
	folder=$$(mktemp -d) && dmat init $$folder/smoke --recipe smoke && cd $$folder/smoke && dmat repro --workers 2 \
		&& cat artifacts/write_report/report/table.md

test: check
	$(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder

test-slow: .venv/ready
	$(BIN)/pytest -m slow

test-gpu: .venv/ready
	$(BIN)/pytest -m gpu

# Starts the services of docker-compose.yml without containers, and needs PostgreSQL's programs.
test-services: .venv/services
	$(BIN)/pytest -m services

# RobustBench brings packages that dmat has no other use for, so it has an environment of its own.
test-robustbench: .venv-robustbench/ready
	.venv-robustbench/bin/pytest -rP tests/test_robustbench.py

# Damaged and hostile files for every reader, some ten minutes; tests/test_fuzzing.py is the short form.
fuzz: .venv/ready
	$(BIN)/python -m tests.fuzzing --inputs $(INPUTS) --out docs/results/fuzz.md

# Damage to every kind of file of a finished project, then kills of a whole `dvc repro`; some ten minutes.
torture: .venv/ready
	$(BIN)/python -m tests.torture --out docs/results/torture.md

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/mypy

ui: .venv/ready
	$(BIN)/dmat ui

# The services of docker-compose.yml, and workers of theirs that compute in PROJECT; docs/services.md.
up: .env certificates/key.pem
	$(COMPOSE) up --build --detach --wait

worker: .env certificates/key.pem
ifeq ($(GPU),)
	$(COMPOSE) --profile worker up --build --detach --wait --scale worker=$(WORKERS) worker
else
	GPU=$(GPU) $(COMPOSE) --profile worker-cuda run --build --detach --rm worker-cuda
endif

down: .env
	$(COMPOSE) --profile worker --profile worker-cuda down --remove-orphans

# A random value behind each name of .env.example that has none.
.env:
	umask 077 && awk '/^[A-Z0-9_]+=$$/ {command = "openssl rand -hex 24"; command | getline value; close(command); \
		$$0 = $$0 value} {print}' .env.example > $@.new && mv $@.new $@

# Of the Dask cluster: a certificate that is its own authority.
certificates/key.pem:
	mkdir -p $(@D) && umask 077 && openssl req -x509 -newkey rsa:3072 -nodes -days 3650 -subj /CN=dmat \
		-out $(@D)/certificate.pem -keyout $@.new && mv $@.new $@

# uv installs the pinned set in half a minute and compiles it in another, once instead of at each start of a command;
# the virtual environment is marked ready only when it is whole.
.venv/ready: constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable ".[dev]"
	touch $@

.venv/services: .venv/ready
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable ".[dev,services]"
	touch $@

.venv-robustbench/ready: .venv/ready
	$(PYTHON) -m venv .venv-robustbench
	$(BIN)/uv pip install --quiet --python .venv-robustbench/bin/python --constraint constraints.txt \
		--editable ".[dev]" robustbench==1.1.1
	$(BIN)/uv pip install --quiet --python .venv-robustbench/bin/python "setuptools<81"  # it imports pkg_resources
	touch $@

clean-env:
	rm -rf .venv .venv-robustbench
