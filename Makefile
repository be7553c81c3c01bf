# The two commands of the README; each is its own set-up.  PYTHON=python3.12 make test  picks another interpreter.
PYTHON ?= python3
PY := .venv/bin/python
# One thread: on two quiet cores a second one makes the demo's steps 1.1 to 1.4 times as fast, beside one busy neighbour 2.6 times as slow
# (libgomp's threads spin at barriers), measured as medians of three runs of 30 to 60 steps.
export OMP_NUM_THREADS ?= 1
IMAGES ?= ../shared/data/monster_toy

.PHONY: demo demo-photos test test-all lint

.venv/ready: pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt "torch>=2.11"
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $@

demo: .venv/ready          ## pivotal tuning of the embedded model: runs/demo/before_after.png and the numbers
	$(PY) -m toy.demo $(ARGS)

demo-photos: .venv/ready   ## the same run on photographs: make demo-photos IMAGES=folder
	$(PY) -m toy.demo --photos "$(IMAGES)" --out runs/photos $(ARGS)

test: .venv/ready          ## all tests that need no GPU
	$(PY) -m pytest -n 2 --dist loadfile $(ARGS)

test-all: .venv/ready      ## and every kernel configuration compiled for every GPU generation: some minutes more
	$(PY) -m pytest -n 2 --dist loadfile -m "full or not full" $(ARGS)

lint: .venv/ready
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
