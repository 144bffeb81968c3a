# make demo | test | test-slow | lint | bench. The environment is built once, in $(VENV); PYTHON=python3.12 make test works.
PYTHON ?= python3
VENV ?= .venv-$(notdir $(PYTHON))
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
# images of 8x8 pixels are too small for two threads to share
DEMO := OMP_NUM_THREADS=1 $(RUN)
# threads of two test processes at once otherwise wait for each other
TEST_ENV := OMP_NUM_THREADS=1 WANDB_MODE=offline

.PHONY: env demo test test-slow test-slow-again lint bench clean

env: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("error: $(PYTHON) is Python %d.%d; pass PYTHON=python3.11 or newer" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

demo: $(READY)
	$(DEMO) -m tq_lightning fit --config conf/digits.yaml --model.quantizer round --trainer.default_root_dir demo/round
	$(DEMO) -m tq_lightning fit --config conf/digits.yaml --model.quantizer floor --trainer.default_root_dir demo/floor
	$(DEMO) -m tq_lightning test --config conf/digits.yaml --trainer.default_root_dir demo/round --ckpt_path last
	$(DEMO) -m tq_lightning test --config conf/digits.yaml --trainer.default_root_dir demo/floor --ckpt_path last
	$(DEMO) -m tq_lightning report demo/round demo/floor --out demo/report
	@echo "the picture: demo/report/figures/qt_gap_resnet8_cifar_digits.png, the page: demo/report/index.html"

test: $(READY)
	$(TEST_ENV) $(RUN) -m pytest -m "not slow and not families and not gpu" -n 2

test-slow: $(READY)
	$(TEST_ENV) $(RUN) -m pytest -m "(slow or families) and not gpu" -n 2 --dist loadfile

test-slow-again: $(READY)
	$(TEST_ENV) $(RUN) -m pytest -m "(slow or families) and not gpu" --last-failed --last-failed-no-failures none

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports

$(VENV)/.peers: $(READY)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,peers]'
	@touch $@

bench: $(VENV)/.peers
	$(RUN) tests/benchmarks/run.py --out results/benchmarks

clean:
	rm -rf $(VENV) demo .pytest_cache .mypy_cache .ruff_cache
