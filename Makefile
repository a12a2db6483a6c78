# The commands of a working day. `make check` before every commit, `make test` before every push.
PYTHON ?= .venv/bin/python
FLOOR := build/venv-floor
export OMP_NUM_THREADS ?= 1

.PHONY: check format test test-slow test-floor nano

check: ## linters and the fast tests
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m mypy
	$(PYTHON) -m pytest -n 2 -m "not slow and not network"

format: ## what ruff can mend by itself
	$(PYTHON) -m ruff check --fix
	$(PYTHON) -m ruff format

test: ## every test
	$(PYTHON) -m pytest -n 2

test-slow: ## what `check` leaves out
	$(PYTHON) -m pytest -n 2 -m "slow or network"

test-floor: ## every test with the oldest transformers that is promised to work
	python3 -m venv $(FLOOR)
	grep -v '^transformers==' constraints.txt > build/constraints-floor.txt
	$(FLOOR)/bin/pip install -q -c build/constraints-floor.txt -e ".[test]" "transformers==5.19.0"
	$(FLOOR)/bin/python -m pytest -n 2

nano: ## train the default model's alignment
	$(PYTHON) -m minigpt4 train recipes/nano.yaml
