PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow lint typed docs soak bench clean
demo: .venv/installed
	$(BIN)/orwcfm finetune --alpha 1 --tau 0.5

test: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest tests -n 2 --dist loadfile -m "not slow and not soak"

test-slow: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest tests -n 2 --dist loadfile -m "slow and not soak" --durations=15

soak: .venv/installed-dev
	$(BIN)/pytest tests -m soak -o faulthandler_timeout=5400

bench: .venv/installed-dev
	$(BIN)/orwcfm bench

# types are checked on an installed copy: in the repository kernels/, cli/ and benchmarks/ stand outside the package
lint: .venv/installed-dev typed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd .venv && MYPYPATH=typed bin/mypy --config-file ../pyproject.toml -p orwcfm_fast

typed: | .venv/bin/python
	rm -rf .venv/typed && $(BIN)/pip install -q --no-deps --target .venv/typed .

# the manual, into site/: open site/index.html; a broken link fails
docs: .venv/installed-docs typed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml | .venv/bin/python
	$(BIN)/pip install -q -e .
	touch $@

.venv/installed-dev: pyproject.toml | .venv/bin/python
	$(BIN)/pip install -q -e '.[test,dev]'
	touch $@ .venv/installed

.venv/installed-docs: pyproject.toml | .venv/bin/python
	$(BIN)/pip install -q -e '.[docs]'
	touch $@ .venv/installed

clean:
	rm -rf .venv build site *.egg-info
