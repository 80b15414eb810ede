# Every target sets up what it needs: a machine with Python 3.11 or newer and make is enough.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.PHONY: demo test test-slow lint bench bench-full clean

demo: $(READY) ## train a small text-to-image model on drawn flowers, draw from it, evaluate it (minutes, no account)
	$(BIN)/python train.py experiment=demo hydra.run.dir=runs/demo $(DEMO) || \
	  { code=$$?; echo 'where the settings of the demo have changed, begin anew: rm -r runs/demo'; exit $$code; }
	test runs/demo/evaluation -nt runs/demo/checkpoints/last.ckpt || rm -rf runs/demo/evaluation # of weights that are gone
	$(BIN)/python sample.py ckpt=runs/demo/checkpoints/last.ckpt hydra.run.dir=runs/demo/drawn gif=true \
	  num_images=4 prompts='[a red rose, two white daisies, three yellow sunflowers, a purple tulip]'
	$(BIN)/python evaluate.py ckpt=runs/demo/checkpoints/last.ckpt protocol=demo hydra.run.dir=runs/demo/evaluation
	@echo
	@echo 'what it drew          runs/demo/drawn/grid.png, single images in runs/demo/drawn/images/'
	@echo 'from noise to image   runs/demo/drawn/trajectory.gif'
	@echo 'as training went on   runs/demo/samples/, loss by timestep in runs/demo/plots/'
	@echo 'the checkpoint        runs/demo/checkpoints/last.ckpt'
	@echo 'the logs              runs/demo/logs/metrics.csv'
	@echo 'the evaluation        runs/demo/evaluation/report.html'
	@echo 'browse its data set   $(BIN)/python -m diffusion.curation.app runs/demo/evaluation'

# Each process grows to 3 GB.
test: $(READY) ## the default test suite, on two processes
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: $(READY) ## the tests that need minutes
	$(BIN)/python -m pytest -m slow -n 2 --dist worksteal

lint: $(READY) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: demo ## ratios against peers, side by side, on small networks and few images
	for script in $$(grep -l __main__ benchmarks/*.py); do $(BIN)/python -m benchmarks.$$(basename $$script .py) || exit 1; done

# On docs/performance.md's machine an hour; the second line takes 17 GB.
bench-full: demo ## the tables of docs/performance.md and docs/samplers.md: the published network, hundreds of images
	$(BIN)/python -m benchmarks.train_step flowers 32
	$(BIN)/python -m benchmarks.train_step flowers 128 --turns 4 --peers
	$(BIN)/python -m benchmarks.guided_sampling flowers
	$(BIN)/python -m benchmarks.evaluate --images 500
	$(BIN)/python -m benchmarks.sweep --images 500 --reals 1000
	$(BIN)/python -m benchmarks.memory --images 500 5000 50000
	$(BIN)/python -m benchmarks.solvers --rows all --images 48 --picture runs/samplers.png
	for script in loader startup training_choices; do $(BIN)/python -m benchmarks.$$script || exit 1; done

clean: ## remove the environment
	rm -rf .venv

# uv installs the hashed pins in seconds, from the index that pip is configured for; anew when the pins change.
$(READY): requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Anther needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv .venv # none, or half of one
	$(BIN)/python -m pip install --quiet --require-hashes --requirement requirements-uv.txt
	index=$${PIP_INDEX_URL:-$$($(BIN)/python -m pip config get global.index-url 2>/dev/null)}; \
	  $(BIN)/uv pip sync --quiet --python $(BIN)/python --require-hashes $${index:+--index-url "$$index"} requirements.txt
	touch $(READY)
