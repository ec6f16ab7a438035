# `make repro` runs the main job, `make test` the tests; each works alone on a fresh clone.
PYTHON ?= python3
BIN := .venv/bin
export DVC_NO_ANALYTICS := 1
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: repro smoke test test-slow test-gpu test-robustbench fuzz torture check ui clean-env

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

# RobustBench brings packages that dmat has no other use for, so it has an environment of its own.
test-robustbench: .venv-robustbench/ready
	.venv-robustbench/bin/pytest -rP tests/test_robustbench.py

# Damaged and hostile files for every reader, some ten minutes; tests/test_fuzzing.py is the short form.
fuzz: .venv/ready
	$(BIN)/python -m tests.fuzzing --inputs 20000 --out docs/results/fuzz.md

# Damage to every kind of file of a finished project, then kills of a whole `dvc repro`; some ten minutes.
torture: .venv/ready
	$(BIN)/python -m tests.torture --out docs/results/torture.md

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/mypy

ui: .venv/ready
	$(BIN)/dmat ui

# uv installs the pinned set in half a minute and compiles it in another, once instead of at each start of a command;
# the virtual environment is marked ready only when it is whole.
.venv/ready: constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable ".[dev]"
	touch $@

.venv-robustbench/ready: .venv/ready
	$(PYTHON) -m venv .venv-robustbench
	$(BIN)/uv pip install --quiet --python .venv-robustbench/bin/python --constraint constraints.txt \
		--editable ".[dev]" robustbench==1.1.1
	$(BIN)/uv pip install --quiet --python .venv-robustbench/bin/python "setuptools<81"  # it imports pkg_resources
	touch $@

clean-env:
	rm -rf .venv .venv-robustbench
