PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow lint soak bench clean
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
lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf .venv/typed && $(BIN)/pip install -q --no-deps --target .venv/typed .
	cd .venv && MYPYPATH=typed bin/mypy --config-file ../pyproject.toml -p orwcfm_fast

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml | .venv/bin/python
	$(BIN)/pip install -q -e .
	touch $@

.venv/installed-dev: pyproject.toml | .venv/bin/python
	$(BIN)/pip install -q -e '.[test,dev]'
	touch $@ .venv/installed

clean:
	rm -rf .venv build *.egg-info
