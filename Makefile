# setup: .venv with the tested versions   demo: the comparison on a laptop CPU
# test: the test suite, on the CPU   test-gpu: the tests that are for a GPU, on one
# check: lint, format, types   wheel: dist/*.whl, checked in an empty venv
# docs: the documentation site, into site/, warnings being errors
# gpu-report: what is open on this machine's GPU, within 9 minutes, into runs/gpu-report

.DEFAULT_GOAL := setup
.PHONY: setup demo test test-gpu gpu-report check docs wheel clean

VENV := .venv
STAMP := $(VENV)/.installed-alignlab

setup: $(STAMP)

$(VENV)/bin/python:
	@for python in $(PYTHON) python3.12 python3.11 python3; do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; then \
	    echo "using $$("$$python" --version), $$(command -v "$$python")"; \
	    "$$python" -m venv $(VENV) && exit 0; \
	    rm -rf $(VENV); \
	    echo "error: $$python cannot make a virtual environment; on Debian or Ubuntu install python3-venv" >&2; \
	    exit 1; \
	  fi; \
	done; \
	echo "error: alignlab needs Python 3.11 or 3.12 and found neither; say where: make PYTHON=/path/to/python3.12" >&2; \
	exit 1

# sam2 without its dependencies: it asks for torchvision, whose published wheel does not import beside
# a CPU-only torch and breaks transformers' image processors with it.
$(STAMP): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install -c constraints.txt -e '.[dev]'
	SAM2_BUILD_CUDA=0 $(VENV)/bin/python -m pip install -c constraints.txt --no-deps --no-build-isolation sam2
	@touch $@

demo: setup
	$(VENV)/bin/alignlab demo

# Two workers of one thread each: the tests' tensors are too small for more threads. Bytecode is kept,
# or each of the processes that tests start would compile the package again.
test: setup
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-gpu: setup
	ALIGNLAB_TEST_GPU=1 $(VENV)/bin/python -m pytest

gpu-report: setup
	$(VENV)/bin/alignlab bench gpu-report --device cuda

check: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: setup
	rm -rf site
	$(VENV)/bin/python -P -m sphinx -q -W --keep-going -c docs/site -d build/doctrees . site
	$(VENV)/bin/python -P docs/site/check_site.py site
	@echo "site: $(CURDIR)/site/index.html"

wheel: setup
	VENV=$(VENV) .ci/wheel_check.sh

clean:
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
