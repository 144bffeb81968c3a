# make demo | test | test-slow | test-lowest | test-wheel | test-executorch | lint | docs | bench | gpu
# The environment is created once, in $(VENV). PYTHON=python3.12 make test uses another interpreter.
PYTHON ?= python3
VENV ?= .venv-$(notdir $(PYTHON))
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
# Images of 8x8 pixels are too small to split between two threads.
DEMO := OMP_NUM_THREADS=1 $(RUN)
# With more threads, parallel test processes compete for the cores.
TEST_ENV := OMP_NUM_THREADS=1 WANDB_MODE=offline

.PHONY: env demo test test-slow test-slow-again test-lowest test-wheel test-executorch lint docs bench gpu clean

env: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else "error: $(PYTHON) is Python %d.%d; pass PYTHON=python3.11, 3.12 or 3.13" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

demo: $(READY)
	$(DEMO) -m tq_lightning fit --config conf/digits.yaml --model.quantizer round --trainer.default_root_dir demo/round
	$(DEMO) -m tq_lightning fit --config conf/digits.yaml --model.quantizer floor --trainer.default_root_dir demo/floor
	$(DEMO) -m tq_lightning test --config conf/digits.yaml --trainer.default_root_dir demo/round --ckpt_path last
	$(DEMO) -m tq_lightning test --config conf/digits.yaml --trainer.default_root_dir demo/floor --ckpt_path last
	$(DEMO) -m tq_lightning report demo/round demo/floor --out demo/report
	@echo "figure: demo/report/figures/qt_gap_resnet8_cifar_digits.png, page: demo/report/index.html"

test: $(READY)
	$(TEST_ENV) $(RUN) -m pytest -m "not slow and not families and not gpu" -n 2

test-slow: $(READY)
	$(TEST_ENV) $(RUN) -m pytest -m "(slow or families) and not gpu" -n 2 --dist loadfile

test-slow-again: $(READY)
	$(TEST_ENV) $(RUN) -m pytest -m "(slow or families) and not gpu" --last-failed --last-failed-no-failures none

# the oldest versions that pyproject.toml allows, in a separate environment
LOWEST := .venv-lowest
test-lowest: $(READY)
	$(PYTHON) -m venv $(LOWEST)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt uv
	$(VENV)/bin/uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct -e '.[test]'
	$(TEST_ENV) $(LOWEST)/bin/python -m pytest -m "not slow and not families and not gpu" -n 2
	$(TEST_ENV) $(LOWEST)/bin/python -m pytest tests/test_versions.py

# the sdist, and the wheel built from it, in an empty environment and from another folder
test-wheel: $(READY)
	rm -rf build/wheel && $(RUN) -m build --quiet --outdir build/wheel .
	$(PYTHON) -m venv build/wheel/venv
	build/wheel/venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt build/wheel/*.whl
	cd build/wheel/venv && bin/tq-lightning --version && bin/tq-lightning inspect --model.name resnet8_cifar
	cd build/wheel/venv && bin/tq-lightning classify $(CURDIR)/results/digits_example/model.safetensors \
		$(CURDIR)/results/digits_example/images --bits 2 --top 1
	cd build/wheel/venv && bin/tq-lightning report $(CURDIR)/results/runs/levels_digits --out report
	rm -rf build/wheel

# ExecuTorch and its compiler packages, in an environment that extends the one of the tests
EXECUTORCH := .venv-executorch
test-executorch: $(READY)
	$(PYTHON) -m venv --clear $(EXECUTORCH)
	$(RUN) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> $$($(EXECUTORCH)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/tests.pth
	$(EXECUTORCH)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt executorch
	$(TEST_ENV) PYTHONPATH=$(CURDIR) $(EXECUTORCH)/bin/python -m pytest tests/export/test_executorch.py -n 2

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/codespell
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports

$(VENV)/.docs: $(READY)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,docs]'
	@touch $@

docs: $(VENV)/.docs
	$(RUN) -m sphinx --fail-on-warning --keep-going --nitpicky --quiet docs build/docs
	@echo "site: build/docs/index.html"

$(VENV)/.peers: $(READY)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,peers]'
	@touch $@

bench: $(VENV)/.peers
	$(RUN) tests/benchmarks/run.py --out results/benchmarks

# the tests that need a CUDA device, and the benchmark on it; under 10 minutes
gpu: $(READY)
	WANDB_MODE=offline $(RUN) -m pytest -m gpu tests/training/test_gpu.py
	$(RUN) tests/benchmarks/gpu.py --out results/benchmarks/gpu.csv
	$(RUN) tests/benchmarks/run.py --tables

clean:
	rm -rf $(VENV) $(LOWEST) $(EXECUTORCH) build demo .pytest_cache .mypy_cache .ruff_cache
