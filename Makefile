# make setup   create .venv and install everything that building and testing need (pip, Python 3.11 or newer)
# make demo    the whole path on the garden: train, export, prove, bench; the report is demo/report.html
# make test    the fast tests       make check   lint, types, floors: what CI runs
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test check format clean

setup: .venv/ready

.venv/ready: pyproject.toml
	@echo "setup: creating .venv and installing kdc-edge with its development tools (several GB with PyTorch)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: setup
	$(BIN)/kdc-edge quickstart --out demo

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv demo build *.egg-info
