PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONSTRAINTS ?=

.PHONY: demo test test-slow test-lowest test-versions lint typed docs soak bench mnist clean
demo: $(VENV)/installed
	$(BIN)/orwcfm finetune --alpha 1 --tau 0.5

test: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest tests -n 2 --dist loadfile -m "not slow and not soak"

test-slow: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest tests -n 2 --dist loadfile -m "slow and not soak" --durations=15

# the ends and the middle of pyproject.toml's ranges; an environment each under .versions/, made where it is missing
test-lowest:
	$(MAKE) test VENV=.versions/lowest CONSTRAINTS=constraints/lowest.txt

test-versions: test-lowest
	$(MAKE) test VENV=.versions/torch-2.14 CONSTRAINTS=constraints/torch-2.14.txt
	$(MAKE) test VENV=.versions/newest

soak: $(VENV)/installed-dev
	$(BIN)/pytest tests -m soak -o faulthandler_timeout=5400

bench: $(VENV)/installed-dev
	$(BIN)/orwcfm bench

# the MNIST model and classifier that ship, made anew from the files in DATA: an hour on 2 cores
mnist: $(VENV)/installed-dev
	$(BIN)/python -m orwcfm_fast.benchmarks.mnist classifier --data-dir $(DATA)
	$(BIN)/orwcfm pretrain --recipe mnist-small --data-dir $(DATA) --out runs/mnist-small --overwrite
	$(BIN)/python -m orwcfm_fast.benchmarks.mnist model runs/mnist-small --data-dir $(DATA) \
		--out benchmarks/results/mnist-model.json

# types are checked on an installed copy: in the repository kernels/, cli/ and benchmarks/ stand outside the package
lint: $(VENV)/installed-dev typed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd $(VENV) && MYPYPATH=typed bin/mypy --config-file $(CURDIR)/pyproject.toml -p orwcfm_fast

typed: | $(VENV)/bin/python
	rm -rf $(VENV)/typed && $(BIN)/pip install -q --no-deps --target $(VENV)/typed .

# the manual, into site/: open site/index.html; a broken link fails
docs: $(VENV)/installed-docs typed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install -q $(CONSTRAINTS:%=-c %) -e .
	touch $@

$(VENV)/installed-dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install -q $(CONSTRAINTS:%=-c %) -e '.[test,dev]'
	touch $@ $(VENV)/installed

$(VENV)/installed-docs: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install -q $(CONSTRAINTS:%=-c %) -e '.[docs]'
	touch $@ $(VENV)/installed

clean:
	rm -rf .venv .versions build site *.egg-info
