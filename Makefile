# make demo | make test | make install. Each target sets up .venv first if pyproject.toml or constraints.txt changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check

.PHONY: install demo test clean
.DELETE_ON_ERROR:

install: $(VENV)/installed

# torch comes first, at its exact pin: whatever depends on it then finds it there and brings no other build.
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "error: Python is %d.%d; minitron needs 3.11 or later (make PYTHON=…)" % sys.version_info[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet "$$(grep '^torch==' constraints.txt)"
	$(PIP) install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(PIP) install --quiet --constraint constraints.txt --editable '.[test,sweep]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/python -m minitron.run

# Waiting threads sleep instead of spinning: on a busy machine that is the difference between minutes and hours.
test: $(VENV)/installed-test
	OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) runs/store build *.egg-info
