# The two commands of the README; each is its own set-up.  PYTHON=python3.12 make test  picks another interpreter.
PYTHON ?= python3
PY := .venv/bin/python
# Nothing: PyPI's build of torch, which on Linux brings CUDA, about 3 GB.  make demo TORCH=cpu: PyTorch's CPU build.
TORCH :=
ifneq ($(filter-out cpu,$(TORCH)),)
$(error TORCH=$(TORCH) is no build of torch; say TORCH=cpu, or leave it out for the one on PyPI)
endif
# What pip is asked for, in two calls. .ci/pins asks the registry whether these very words resolve.
TORCH_WANTED := -c constraints.txt$(if $(TORCH), --index-url https://download.pytorch.org/whl/cpu) "torch>=2.11"
REST_WANTED := -c constraints.txt -e ".[test]"
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
# One thread: on two quiet cores a second one makes the demo's steps 1.1 to 1.4 times as fast, beside one busy neighbour 2.6 times as slow
# (libgomp's threads spin at barriers), measured as medians of three runs of 30 to 60 steps.
export OMP_NUM_THREADS ?= 1
IMAGES ?= ../shared/data/monster_toy

.PHONY: ready wanted demo demo-photos demo-fusion test fuzz soak test-other-cpu test-all lint docs

.venv/ready: pyproject.toml constraints.txt
	$(PY) -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv .venv
	@$(PY) -c "import sys; v = sys.version.split()[0]; \
	sys.exit(sys.version_info < (3, 11) and f'.venv has Python {v}, expected 3.11 or newer: rm -r .venv, then PYTHON=python3.12 make ...')"
	$(PIP) $(TORCH_WANTED)
	$(PIP) $(REST_WANTED)
	touch $@

ready: .venv/ready
ifeq ($(TORCH),cpu)
	@$(PY) -c "import sys; from importlib.metadata import version; v = version('torch'); \
	sys.exit(sys.platform == 'linux' and '+cpu' not in v and f'.venv has torch {v}, expected a CPU build: rm -r .venv, then make again')"
endif

wanted:
	@printf '%s\n' '$(TORCH_WANTED)' '$(REST_WANTED)'

demo: ready          ## pivotal tuning of the embedded model: runs/demo/before_after.png and the numbers
	$(PY) -m toy.demo $(ARGS)

demo-photos: ready   ## the same run on photographs: make demo-photos IMAGES=folder
	$(PY) -m toy.demo --photos "$(IMAGES)" --out runs/photos $(ARGS)

demo-fusion: ready   ## two concepts, learned apart, in one model and in one image: runs/fusion/fusion.png
	$(PY) -m toy.fusion $(ARGS)

test: ready          ## all tests that need no GPU
	$(PY) -m pytest -n 2 --dist loadfile $(ARGS)

fuzz: ready          ## every command on 10,000 damaged files; FUZZ_SEED=7 make fuzz takes others
	FUZZ_CASES=$${FUZZ_CASES:-10000} $(PY) -m pytest -n 0 tests/test_fuzz.py tests/test_corrupt.py $(ARGS)

soak: ready          ## 20,000 steps, kills, full disks, damaged checkpoints, large sets: an hour or two; SOAK_SEED=7 make soak kills elsewhere
	$(PY) -m pytest -n 0 -s -m soak $(ARGS)

test-all: ready      ## and every kernel configuration compiled for every GPU generation: some minutes more
	$(PY) -m pytest -n 2 --dist loadfile -m "not soak" $(ARGS)

# Without AVX, and with other orders of sums, as on another processor: a tolerance that only fits one machine is found.
OTHER_CPU := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=AVX2 DNNL_MAX_CPU_ISA=AVX2 MKL_CBWR=COMPATIBLE
SUMMED := train step step_inputs stages setup checkpoints scores results resume fused injection sampling \
	trained_files flux
SUMS := $(foreach stem,$(SUMMED),tests/test_$(stem).py)
test-other-cpu: ready
	$(OTHER_CPU) $(PY) -m pytest -n 2 --dist loadfile $(SUMS) $(ARGS)

lint: ready
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

WINGS := adapters data diffusion flags formats kernels memory optim runs config family placeholders prodigy tokens
DOCUMENTED := lora_core $(foreach wing,$(WINGS),lora_core.$(wing)) merging training models
docs: ready          ## API reference of lora_core, merging, training and models: build/docs/index.html
	$(PIP) -c constraints.txt -e ".[docs]"
	$(PY) -m pdoc --docformat markdown -o build/docs $(DOCUMENTED)
