# `make quickstart` runs the whole pipeline, `make demo` a real model, `make test` the tests; they set up what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
unexport PYTHONDONTWRITEBYTECODE
export PATH := $(abspath $(BIN)):$(PATH)  # optimum-habana asks `pip list` for the plugin's version
export PIP_DISABLE_PIP_VERSION_CHECK = 1

# A Gaudi host has Habana's tools or its plugin; there torch and the plugin are the container's own.
GAUDI := $(shell command -v hl-smi 2>/dev/null || $(PYTHON) -c "from importlib.metadata import version; \
	assert '+cpu' not in version('habana-torch-plugin'); print('plugin')" 2>/dev/null)
REQUIREMENTS := $(if $(GAUDI),requirements.txt,requirements-cpu.txt)
INSTALL := $(BIN)/pip install --quiet --constraint requirements-lock.txt

.PHONY: help setup quickstart demo chat test test-hpu test-gaudi-host soak mutants models formats flags lint format bench clean
help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*##/ {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.done  ## Make .venv with pinned packages; TORCH_INDEX=URL takes torch from another index
$(VENV)/.done: requirements.txt requirements-cpu.txt requirements-lock.txt $(shell find emulator -name '*.py' -o -name '*.toml')
	@$(PYTHON) -c "import sys; assert (3, 10) <= sys.version_info < (3, 13), 'Python 3.10 to 3.12 is needed, this is ' \
		+ sys.version.split()[0] + '; name another one with make setup PYTHON=python3.11'"
	@echo "Setting up $(VENV) from $(REQUIREMENTS)$(if $(GAUDI), for this Gaudi host)"
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(if $(GAUDI),--system-site-packages) $(VENV)
ifneq ($(TORCH_INDEX),)
	$(INSTALL) --index-url $(TORCH_INDEX) $(shell grep -o '^torch==[^ ]*' requirements-cpu.txt)
endif
	$(INSTALL) --requirement $(REQUIREMENTS)
ifeq ($(GAUDI),)
	$(BIN)/pip install --quiet --no-deps --force-reinstall ./emulator
endif
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true  # some packages ship files for other Pythons
	@touch $@

$(VENV)/.dev: $(VENV)/.done requirements-dev.txt requirements-lock.txt
	$(INSTALL) --requirement requirements-dev.txt
	@touch $@

quickstart: setup  ## Train, merge, align and ask a small model: the whole pipeline, in minutes
	$(BIN)/python quickstart/run.py

demo: setup  ## Align a real model of 135M weights, in minutes; SEEDS="0 1 2" for three runs
	$(BIN)/python demo/run.py $(if $(SEEDS),--seeds $(SEEDS))

chat: setup  ## Talk to a model: MODEL=FOLDER, and COMPARE=FOLDER for two side by side
	@test -n "$(MODEL)" || { echo "Name a model: make chat MODEL=FOLDER"; exit 2; }
	@$(BIN)/python run_generation.py --chat --model_name_or_path "$(MODEL)" $(if $(COMPARE),--compare "$(COMPARE)") \
		--use_hpu_graphs --max_new_tokens 256

# Small models are no work for a second thread, which spins while it waits: beside other processes tests took 5 times as long.
test: export OMP_NUM_THREADS ?= 1
test: $(VENV)/.dev  ## Run the tests (no card, no network needed); TESTS="tests/test_sft.py" runs some
	$(BIN)/python -m slipcover -m pytest -m "not soak" $(TESTS)

test-hpu: $(VENV)/.dev  ## Smoke run for CI on a single Gaudi card; figures in runs/test-hpu/report.json
	$(BIN)/python -m pytest -m hpu $(TESTS)

test-gaudi-host: setup  ## Try these targets on a simulated Gaudi host
	$(BIN)/python tests/gaudi_host.py

soak: $(VENV)/.dev  ## Run the long grids and kill loops
	$(BIN)/python -m pytest -m soak

mutants: $(VENV)/.dev  ## Change the code at random, list what no test notices (hours); MUTANTS="align.data.packing*" some
	$(INSTALL) --requirement requirements-mutants.txt
	$(BIN)/mutmut run $(MUTANTS)
	@for name in $$($(BIN)/mutmut results | sed -n 's/: survived//p'); do $(BIN)/mutmut show $$name; done

models: setup  ## Compare the model families with plain transformers and write docs/models.md
	$(BIN)/python tests/measure_families.py docs/models.md

formats: setup  ## Write docs/formats.md: a row of each format, and what is learnt of it
	$(BIN)/python tests/show_formats.py

flags: setup  ## Write docs/flags.md from what the scripts' --help says
	$(BIN)/python tests/describe_flags.py docs/flags.md

lint: $(VENV)/.dev  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev  ## Fix style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: export HABANA_EMULATOR_STRICT = 0
bench: setup  ## Measure against upstream's way (minutes to hours)
	for script in benchmarks/[a-z]*.py; do $(BIN)/python $$script || exit; done

clean:  ## Remove the environment and what runs wrote
	rm -rf $(VENV) runs mutants
