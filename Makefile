# The commands of a working day. `make check` before every commit, `make test` before every push.
PYTHON ?= .venv/bin/python
FLOOR := build/venv-floor
export OMP_NUM_THREADS ?= 1

.PHONY: check format test test-slow test-floor soak nano

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

soak: ## the long tests of the server, each with its figure; SOAK=0.1 for a tenth of them
	$(PYTHON) -m pytest -s -q tests/serving/soak.py

SPRITE_SETS := @lobehub/fluent-emoji-3d@1.1.0 @iconify-json/noto@1.2.9 @iconify-json/twemoji@1.2.5 \
    emojibase-data@17.0.0
DATA ?= data

nano: build/sprites ## train the default model's alignment; DATA is the folder of photographs
	$(PYTHON) -m nano.train nano/recipe.yaml \
		--set mixture.photos=$(DATA)/photos-train --set mixture.backgrounds=$(DATA)/photos-background

build/sprites: ## named drawings out of emoji sets of the npm registry
	mkdir -p build/npm
	cd build/npm && npm pack --silent $(SPRITE_SETS)
	$(PYTHON) -c "from pathlib import Path; from nano.sprites import build_sprites; build_sprites(Path('build/npm'), Path('build/sprites.new'))"
	mv build/sprites.new build/sprites
