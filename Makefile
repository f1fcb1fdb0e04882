# Each target does all the set-up it needs: the environment in .venv, the C cores, the programs that tests run.
# Nothing is set up twice; a change of pyproject.toml or of a C source is noticed.

VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -q
CORES := $(wildcard lazyproc/*/_*.c lazyproc/*/_*.h lazyproc/*/_*_build.py)

.PHONY: demo test test-fast test-long soak build bench check sanitize zdtm clean

# The main job on this machine, between two hosts, verified.
demo: build $(VENV)/.tools
	@$(BIN)/lazyproc demo

test: build $(VENV)/.tools
	@$(PYTEST) -m "not long"

test-fast: build $(VENV)/.tools
	@$(PYTEST) -m "not long and not slow"

test-long: build $(VENV)/.tools
	@$(PYTEST) -m long; status=$$?; test $$status -eq 5 || exit $$status

# What takes too long for a test, at full size; the figures go to benchmarks/soak.
soak: build $(VENV)/.tools
	@$(BIN)/python -m tests.faults.soak

build: $(VENV)/.cores

bench: build $(VENV)/.tools
	@$(BIN)/python -m benchmarks

# CRIU's own tests with lazyproc-criu in its place, in a built tree of CRIU 4.2 (docs/criu.md).
zdtm: build $(VENV)/.tools
	@test -d "$(CRIU_TREE)/test/zdtm" || { echo "name a tree of CRIU 4.2: make zdtm CRIU_TREE=DIR" >&2; exit 1; }
	@$(BIN)/python -m tests.interop.zdtm $(CRIU_TREE)
	@$(BIN)/python -m tests.interop.zdtm.table

check: build
	@$(BIN)/ruff check -q
	@$(BIN)/ruff format -q --check
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/lint-imports --no-logo > build/imports.log || { cat build/imports.log; exit 1; }

# The C cores once more with the address and undefined-behaviour sanitizers, under the tests that drive them in their own
# process. Their library is preloaded, and so it is in every child: left out are whole hosts and commands, a child that
# loads a core in an environment without it, and programs that judge how long they slept. SIGBUS and signal stacks are
# the tests' own.
SANITIZED := build/sanitized
DRIVING := tests/unit/test_images_pagemap.py tests/faults/test_removals.py $(patsubst %,tests/live/test_%.py, \
  pagemap_scan nursery freeze park server uffd_device pager pager_answers pager_hazards pager_poison pager_stress lazy_region)
UNFIT := tests/faults/test_removals.py::test_removed_after_a_migration_and_while_all_helpers_are_dead \
  tests/live/test_freeze.py::test_a_traced_process_names_its_tracer \
  $(patsubst %,tests/live/test_park.py::test_a_parked_tree_survives_its_tracer_and_runs_on[%],sleeps timers)
sanitize: build $(VENV)/.tools
	@rm -rf $(SANITIZED) && mkdir -p $(SANITIZED) && cp -r lazyproc tests docs pyproject.toml setup.py README.md LICENSE $(SANITIZED)
	@cd $(SANITIZED) && find lazyproc -name '*.so' -delete && \
	  CFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g" \
	  ../../$(BIN)/python setup.py -q build_ext --inplace
	@cd $(SANITIZED) && LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0:handle_sigbus=0:use_sigaltstack=0 \
	  ../../$(PYTEST) -m "not long and not slow" $(DRIVING) $(UNFIT:%=--deselect '%')
	@for driver in tests/sanitize/*.sh; do bash $$driver || exit; done

$(VENV)/.installed: pyproject.toml setup.py .ci/setup
	@.ci/setup venv $(VENV)
	@touch $@

$(VENV)/.cores: $(VENV)/.installed $(CORES)
	@mkdir -p build
	@$(BIN)/python setup.py -q build_ext --inplace --build-temp build
	@$(BIN)/python -m compileall -q lazyproc
	@touch $@

$(VENV)/.tools: .ci/setup
	@mkdir -p $(VENV)
	@.ci/setup tools
	@touch $@

clean:
	@rm -rf build dist *.egg-info $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	@rm -rf tests/programs/bin
	@find lazyproc -name '*.so' -delete
