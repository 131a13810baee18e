# make setup   create .venv and install everything that building and testing need (pip, Python 3.11 or newer)
# make demo    the whole path on the garden: train, export, prove, bench; the report is demo/report.html
# make test    the fast tests       make interop  our bundles in other programs       make check   lint, types, floors: what CI runs
# make docs    the documentation as a site, in site/
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test interop check docs format clean

setup: .venv/ready

.venv/ready: pyproject.toml
	@python=$(BIN)/python; test -x $$python || python="$(PYTHON)"; \
	  $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "setup: kdc-edge needs Python 3.11 or newer, and $$python is $$($$python --version 2>/dev/null || echo not there): run make setup PYTHON=python3.12, without an old .venv" >&2; exit 1; }
	@echo "setup: creating .venv and installing kdc-edge with its development tools (several GB with PyTorch)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: setup
	$(BIN)/kdc-edge quickstart --out demo

# Three workers keep two cores busy: some tests wait for processes that they start.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

# Our bundles in openvino_genai, optimum-intel and optimum-onnx, in an environment that they can live in.
INTEROP := .venv-interop
BUNDLES := onnx-fp32 onnx-fp16 openvino-fp16 openvino-int8

interop: setup $(INTEROP)/ready $(foreach b,$(BUNDLES),$(INTEROP)/bundles/$b/kdc-edge.json $(INTEROP)/bundles/few-steps-$b/kdc-edge.json)
	KDC_EDGE_INTEROP=$(INTEROP) $(INTEROP)/bin/python -m pytest -m interop -o filterwarnings=default tests/interop

$(INTEROP)/ready: tests/interop/requirements.txt
	@test -x $(INTEROP)/bin/python || $(PYTHON) -m venv $(INTEROP)
	$(INTEROP)/bin/python -m pip install --quiet --disable-pip-version-check -r $< --editable .
	@touch $@

EXPORT = $(BIN)/kdc-edge export $1 --target $(firstword $(subst -, ,$*)) --precision $(lastword $(subst -, ,$*)) --out $(@D)

$(INTEROP)/bundles/%/kdc-edge.json: train/assets/garden-teacher/quality.json
	$(call EXPORT,train/assets/garden-teacher)

$(INTEROP)/bundles/few-steps-%/kdc-edge.json: $(INTEROP)/few-steps/checkpoint/model_index.json
	$(call EXPORT,$(INTEROP)/few-steps/checkpoint)

# One step from the teacher's weights: what programs are compared by needs no trained student.
$(INTEROP)/few-steps/checkpoint/model_index.json: train/assets/garden-teacher/quality.json
	rm -rf $(INTEROP)/few-steps
	$(BIN)/kdc-edge train --student garden-teacher --task flowers=garden:flowers --objective phased --phases 4 \
	  --steps 1 --samples 16 --eval-images 2 --log-with none --out $(INTEROP)/few-steps

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy benchmarks examples
	$(BIN)/lint-imports

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-interop demo site build *.egg-info
