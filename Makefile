# One command for each thing a person does here. `make help` lists them.

PYTHON ?= python3
# A version that a CPU-only wheel exists for; anything that pip understands may take its place, a path to a wheel too.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := client service models/underpaint-mini
# What the lock files hold of each package, extras included.
LOCKED = $(patsubst ./service,./service[openvino],$(PACKAGES:%=./%))
# Where the lock files are: every package besides torch, with version and hashes.
LOCKS := requirements
TOOLS := requirements/dev.in
PIP_INSTALL = $(BIN)/pip install --disable-pip-version-check -q
PIP_LOCKED = $(PIP_INSTALL) --no-deps --require-hashes

# What writes the lock files.
UV := uv==0.13.9
COMPILE = .cache/uv/bin/uv pip compile -q --universal --python-version 3.11 --generate-hashes \
	--custom-compile-command 'make lock' --excludes requirements/torch-cuda.in \
	$(addprefix --no-emit-package ,torch underpaint underpaint-mini underpaint-server)

# What `make test-python` looks for on PATH; a path to an interpreter may stand among them.
PYTHONS := python3.12 python3.13

.DEFAULT_GOAL := help
.PHONY: help demo serve test test-lowest test-python coverage check hooks protos lock bench quality deploy-check clean

help: ## list the commands
	@while IFS= read -r line; do \
	  case "$$line" in [a-z]*': '*'## '*) printf '  make %-13s %s\n' "$${line%%:*}" "$${line#*## }";; esac; \
	done < $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.run ## start a server, edit a picture with every method, write demo/contact_sheet.png
	$(BIN)/python -m underpaint_server.local_server $(BIN)/python client/examples/contact_sheet.py --output demo

serve: $(VENV)/.run ## run a server with the embedded model on localhost:50051 until Ctrl-C
	$(BIN)/underpaint-server

test: $(VENV)/.dev ## run every test. ARGS="tests/client -n 1" runs those, in one process
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist loadgroup --durations=10 $(ARGS)

test-lowest: CLIENT = TOOLS=requirements/test.in LOCKS=.cache/lowest-client-locks VENV=.cache/lowest-client PACKAGES=client TORCH=
test-lowest: SERVER = TOOLS=requirements/test.in LOCKS=.cache/lowest-locks VENV=.cache/lowest TORCH=$(shell sed -n 's/^ *"\(torch\)>=\([0-9.]*\)".*/\1==\2/p' service/pyproject.toml)
test-lowest: ## run the tests on the lowest declared version of every direct dependency: the client alone, then everything
	$(MAKE) lock $(CLIENT) ARGS='--resolution lowest-direct --upgrade'
	$(MAKE) test $(CLIENT) ARGS='tests/client'
	$(MAKE) lock $(SERVER) ARGS='--resolution lowest-direct --upgrade'
	$(MAKE) test $(SERVER) ARGS='$(ARGS)'

test-python: ## run the tests on other Pythons. PYTHONS="python3.13 path/to/python" names them; what is not found is skipped
	@for python in $(PYTHONS); do \
		if ! command -v $$python >/dev/null; then echo "SKIPPED: there is no $$python here"; continue; fi; \
		version=$$($$python -c 'import sys; print("%d.%d" % sys.version_info[:2])') && echo "Python $$version: $$python" && \
		$(MAKE) test PYTHON=$$python VENV=.cache/python$$version ARGS='$(ARGS)' || exit; \
	done

coverage: $(VENV)/.dev ## run every test and say how much of the code they run, in the servers' processes too; a third slower
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist loadgroup --cov --cov-report=term $(ARGS)

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

lock: .cache/uv/.installed ## bring requirements/*.txt up to the declared dependencies. ARGS=--upgrade takes the newest of all
	@mkdir -p $(LOCKS)
	@printf '%s\n' $(LOCKED) '$(TORCH)' > .cache/run.in
	$(COMPILE) $(ARGS) -o $(LOCKS)/dev.txt requirements/build.in .cache/run.in $(TOOLS)
	$(COMPILE) -c $(LOCKS)/dev.txt -o $(LOCKS)/run.txt .cache/run.in
	$(COMPILE) -c $(LOCKS)/dev.txt -o $(LOCKS)/build.txt requirements/build.in
	$(COMPILE) $(ARGS) -c $(LOCKS)/dev.txt -o $(LOCKS)/deploy.txt requirements/deploy.in
	$(if $(filter requirements,$(LOCKS)),$(COMPILE) $(ARGS) -c $(LOCKS)/dev.txt -o $(LOCKS)/peers.txt requirements/peers.in)

bench: $(VENV)/.run ## measure speed, exactness and masks, also against diffusers and serving frameworks; writes benchmarks/results
	$(BIN)/python -m benchmarks

quality: $(VENV)/.run ## judge the methods on edits with a known answer; writes benchmarks/quality.md. ARGS="--models old=DIR,new=DIR" compares
	$(BIN)/python -m benchmarks.quality $(ARGS)

deploy-check: $(VENV)/.deploy ## render and validate everything under deploy/ and the Dockerfile, offline
	$(BIN)/python deploy/check.py

clean: ## remove what the other commands made
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis .coverage* demo

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "the venv module is missing: on Debian and Ubuntu, apt-get install python3-venv"; exit 1; }

# Everything is installed by hash; then torch, with what its build alone needs; then our packages, which ask for nothing more.
$(VENV)/.run: $(VENV)/bin/pip $(LOCKS)/build.txt $(LOCKS)/run.txt $(PACKAGES:=/pyproject.toml) client/src/underpaint/_version.py
	$(PIP_LOCKED) -r $(LOCKS)/build.txt -r $(LOCKS)/run.txt
	$(if $(TORCH),$(PIP_INSTALL) '$(TORCH)')
	$(PIP_INSTALL) --no-deps --no-build-isolation $(foreach package,$(PACKAGES),-e $(package))
	@if [ -x $(BIN)/underpaint-server ]; then $(BIN)/underpaint-server export || echo "later starts export again"; fi
	@touch $@

$(VENV)/.dev: $(VENV)/.run $(LOCKS)/dev.txt
	$(PIP_LOCKED) -r $(LOCKS)/dev.txt
	@touch $@

$(VENV)/.deploy: $(VENV)/.run $(LOCKS)/deploy.txt
	$(PIP_LOCKED) -r $(LOCKS)/deploy.txt
	@touch $@

.cache/uv/.installed: Makefile
	@$(PYTHON) -m venv .cache/uv
	.cache/uv/bin/pip install --disable-pip-version-check -q '$(UV)'
	@touch $@
