# One command for each thing a person does here. `make help` lists them.

PYTHON ?= python3
# A version that a CPU-only wheel exists for; anything that pip understands may take its place, a path to a wheel too.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := client service models/underpaint-mini

.DEFAULT_GOAL := help
.PHONY: help demo serve test coverage check hooks protos bench quality deploy-check clean

help: ## list the commands
	@while IFS= read -r line; do \
	  case "$$line" in [a-z]*': '*'## '*) printf '  make %-13s %s\n' "$${line%%:*}" "$${line#*## }";; esac; \
	done < $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.run ## start a server, edit a picture with every method, write demo/contact_sheet.png
	$(BIN)/python -m underpaint_server.local_server $(BIN)/python client/examples/contact_sheet.py --output demo

serve: $(VENV)/.run ## run a server with the embedded model on localhost:50051 until Ctrl-C
	$(BIN)/underpaint-server

test: $(VENV)/.dev ## run every test
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist loadgroup --durations=10

coverage: $(VENV)/.dev ## run every test and say how much of the code they run, in the servers' processes too; a third slower
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist loadgroup --cov --cov-report=term

check: $(VENV)/.dev ## format, lint, types, import layers, contract lint, generated files up to date
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python protos/generate.py --check
	$(BIN)/python client/make_sync.py --check

hooks: $(VENV)/.dev ## let git check format, lint and generated files at every commit
	$(BIN)/pre-commit install

protos: $(VENV)/.dev ## generate the wire code and the synchronous client
	$(BIN)/python protos/generate.py
	$(BIN)/python client/make_sync.py

bench: $(VENV)/.run ## measure speed and quality, as ratios within one run; writes benchmarks/results
	$(BIN)/python -m benchmarks

quality: $(VENV)/.run ## judge the methods on edits with a known answer; writes benchmarks/quality.md. ARGS="--models old=DIR,new=DIR" compares
	$(BIN)/python -m benchmarks.quality $(ARGS)

deploy-check: $(VENV)/.deploy ## render and validate everything under deploy/ and the Dockerfile, offline
	$(BIN)/python deploy/check.py

clean: ## remove what the other commands made
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .coverage* demo

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "the venv module is missing: on Debian and Ubuntu, apt-get install python3-venv"; exit 1; }

$(VENV)/.run: $(VENV)/bin/pip constraints.txt $(PACKAGES:=/pyproject.toml)
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt '$(TORCH)'
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt $(foreach package,$(PACKAGES),-e $(package))
	@touch $@

$(VENV)/.dev: $(VENV)/.run requirements-dev.txt
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -r requirements-dev.txt
	@touch $@

$(VENV)/.deploy: $(VENV)/.run deploy/requirements.txt
	$(BIN)/pip install --disable-pip-version-check -q -r deploy/requirements.txt
	@touch $@
