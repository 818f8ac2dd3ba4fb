# make demo    train, compress in three ways, export and reload two small models
# make test    the default tests
# make check   everything CI runs
# make clean   remove what the others made
#
# Each installs into .venv first, when needed. PYTHON=python3.12 chooses another interpreter.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
EXTRAS := dev,cli,hf,peft,vision,onnx,genai,openvino,viz
# Written last: an environment without it was interrupted half-way, and is built anew.
INSTALLED := $(VENV)/.installed

# The browser in which a test clicks through a report; without npm the test skips.
BROWSER := tests/report/browser/node_modules

.PHONY: demo test check clean
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	$(RUN) -m benchmarks.demo

test: $(INSTALLED)
	$(RUN) -m pytest

check: $(INSTALLED) $(BROWSER)
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	$(RUN) -m pytest
	$(RUN) -m pytest -m "ci or zoo_slice"

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "graphcomp needs Python >= 3.11; try make PYTHON=python3.11")'
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	@echo 'installing into $(VENV): a few minutes the first time'
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

$(BROWSER): tests/report/browser/package.json
	@if command -v npm > /dev/null; then cd $(@D) && npm install --silent --no-audit --no-fund || echo 'npm failed: the report is not clicked through'; \
	else echo 'npm is not there: the report is not clicked through'; fi

clean:
	rm -rf $(VENV) $(BROWSER) build dist graphcomp.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
