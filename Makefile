# Short commands only; what they do lives in the code they call. `make help` lists them.
PYTHON ?= python3
VENV ?= .venv
MLSERVER_VENV ?= .venv-mlserver
DEPLOY_VENV ?= .venv-deploy
BIN := $(VENV)/bin
DURATION ?= 20
RATE ?= 150
# Arguments that may have spaces in them are quoted where they are used.
WITH_DATA = $(if $(DATA),--data "$(DATA)")
WITH_JSON = $(if $(JSON),--json "$(JSON)")
WITH_EDGE = $(if $(EDGE),--edge $(EDGE))
# Where an image sets it, every process that is started would compile all of pretrade anew, for a second of a core.
unexport PYTHONDONTWRITEBYTECODE
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all clean check check-deploy js protos lock pages test-long test-plain simulate simulate-mutations fuzz sanitize faults mlserver models canaries bench bench-compare bench-copy bench-costs bench-path bench-client bench-client-js bench-faults bench-flips bench-features bench-guests bench-indicators bench-lookups bench-serving sizing soak

help:  ## this list
	@awk -F ':.*## ' '/^##@ / {printf "\n%s\n", substr($$0, 5)} /^[a-z-]+:.*## / {printf "  make %-20s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

##@ Start here
setup: $(BIN)/.compiled  ## make .venv with everything pretrade and its tests need, once; every other target does it first (LOCKED=1: by the hashes in requirements/)

# With LOCKED=1 exactly what requirements/*.txt name, by their hashes; TORCH='torch==2.13.0' for a build of your own index.
$(BIN)/.installed: pyproject.toml client/pyproject.toml $(if $(LOCKED),$(wildcard requirements/*.txt))
	@LOCKED="$(LOCKED)" TORCH="$(TORCH)" .ci/setup "$(PYTHON)" "$(VENV)"
	@touch $@

$(BIN)/.compiled: $(BIN)/.installed hatch_compile.py feature_cache/compiled.py $(wildcard feature_cache/*.pyx server/*/*.pyx)
	@$(BIN)/python hatch_compile.py
	@touch $@

demo: setup  ## the whole stack on this machine, orders, a replica failure, a summary: a minute (DATA=dir DURATION=s RATE=orders/s JSON=file SVG=file)
	$(BIN)/pretrade demo --duration $(DURATION) --rate $(RATE) $(WITH_DATA) $(WITH_JSON) $(if $(SVG),--svg "$(SVG)")

test: setup  ## all but the longer tests, against real servers, three files at a time: up to 18 minutes on two cores; it says what it left out
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --max-worker-restart=0

test-all: setup  ## everything, for a night: test, test-long, MLServer, faults on both edges, an hour of simulation, fuzzing, sanitizers
	@failed=; for part in test test-long test-plain mlserver 'faults EDGE=grpcio' 'faults EDGE=envoy' 'simulate SECONDS=3600' 'fuzz SECONDS=600' sanitize; do \
	  $(MAKE) $$part || failed="$$failed [$$part]"; done; test -z "$$failed" || { echo "failed:$$failed" >&2; exit 1; }

clean:  ## remove all that make has made here: environments, caches, the stack's data
	@$(PYTHON) .ci/clean $(VENV) $(MLSERVER_VENV) $(DEPLOY_VENV)

##@ Change it
check: setup  ## lint, types, import direction, contract, generated code
	.ci/check

check-deploy: setup $(DEPLOY_VENV)/.installed  ## every file of the deployment, offline: one table
	DEPLOY_VENV=$(DEPLOY_VENV) $(BIN)/python .ci/check-deploy

$(DEPLOY_VENV)/.installed: pyproject.toml client/pyproject.toml
	$(PYTHON) -m venv $(DEPLOY_VENV)
	$(DEPLOY_VENV)/bin/python $(PIP_INSTALL) $(if $(LOCKED),--no-deps --require-hashes --requirement requirements/deploy.txt,./client '.[deploy]')
	@touch $@

pages: setup  ## write the generated pages of docs/ anew: failures, metrics, reason codes, settings
	$(BIN)/python -m server.reference
	PYTHONPATH=tests $(BIN)/python -m support.failures

js: setup  ## the JavaScript client in client/js: its packages as its lock file has them, compiled to dist/ (needs npm)
	$(BIN)/python .ci/js

protos: setup  ## generate the stubs in proto/gen and client/js/src/gen, and the OpenAPI document anew
	.ci/protos

lock: setup  ## write requirements/*.txt anew, after a change of a pin in a pyproject.toml
	$(BIN)/python .ci/lock

test-long: setup  ## the longest of the tests, which `make test` leaves out
	$(BIN)/python -m pytest -m 'long and not fault' $(ARGS)

test-plain: setup  ## the unit tests with nothing compiled, as where there is no compiler
	CI= PRETRADE_COMPILED=0 $(BIN)/python -m pytest -n 2 tests/unit

simulate: setup  ## seeds of a simulated server, until its time is up or a seed fails (SEEDS=n SECONDS=s SEED=n TRACE=1 ARGS='--profile audit')
	PYTHONPATH=tests $(BIN)/python -m simulation $(if $(SEEDS),--seeds $(SEEDS)) $(if $(SECONDS),--seconds $(SECONDS)) $(if $(SEED),--seed $(SEED)) $(if $(TRACE),--trace) $(ARGS)

simulate-mutations: setup  ## takes one protection after another out of a copy of the source; the simulation must find each (ARGS='key')
	PYTHONPATH=tests $(BIN)/python -m simulation.mutations $(ARGS)

fuzz: setup  ## coverage-guided fuzzing of framing, the ASGI edge, the lane, JSON, queries and the reader of orders, so long each (SECONDS=60)
	for target in framing asgi lane json query orders; do PYTHONPATH=tests $(BIN)/python -m fuzz $$target $(or $(SECONDS),60) || exit 1; done

sanitize: setup  ## the compiled modules under AddressSanitizer: their tests, and fuzzing of what reads callers' bytes (needs gcc and libasan)
	VENV=$(VENV) .ci/sanitize

faults: setup  ## the whole fault matrix with real processes, and its table (ARGS='-k cluster' for a part, EDGE=envoy)
	$(if $(EDGE),TEST_EDGE=$(EDGE)) $(BIN)/python -m pytest tests/faults -m fault $(ARGS)

mlserver: setup  ## MLServer in an environment of its own, and the tests that it scores as TorchServe does, loads versions, and has a canary
	test -x $(MLSERVER_VENV)/bin/mlserver || { $(PYTHON) -m venv $(MLSERVER_VENV) && $(MLSERVER_VENV)/bin/python $(PIP_INSTALL) --requirement tests/mlserver.txt; }
	MLSERVER_VENV="$(abspath $(MLSERVER_VENV))" $(BIN)/python -m pytest -m 'long or not long' tests/integration/test_open_inference.py tests/integration/test_canary_on_oip_servers.py tests/contract/test_model_repository.py

##@ Models
models: setup  ## train, evaluate and export champion and challenger, with their cards (DATA=dir)
	$(BIN)/pretrade train --install --force $(WITH_DATA)

canaries: setup  ## three canaries on the whole stack, each to its end: good, late, inverted (DATA=dir JSON=file)
	$(BIN)/pretrade canary-demo $(WITH_DATA) $(WITH_JSON)

##@ Measure it
bench: setup  ## decisions a second, latency, CPU, next to echoes, TorchServe, FastAPI; what is met of the targets (QUICK=1 KEEP=1 DATA=dir PROFILE=file JSON=file AGAINST=commit)
	$(BIN)/pretrade bench $(if $(QUICK),--quick) $(if $(AGAINST),--against "$(AGAINST)") $(if $(KEEP),--keep) $(WITH_DATA) $(if $(PROFILE),--profile "$(PROFILE)") $(WITH_JSON)

sizing: setup  ## the tables of docs/figures.md, measurements.md and sizing.md, from the run of `make bench` that was kept last
	$(BIN)/python -m loadtest.benchmark.sizing

bench-compare: setup  ## the last `make bench` against the one that was kept last
	$(BIN)/pretrade bench-compare

bench-costs: setup  ## what audit, shadow rows, metrics, traces and logs cost a decision, and where its CPU goes (EDGE=grpcio JSON=file ARGS='--variant audit-off')
	$(BIN)/pretrade bench-costs $(WITH_EDGE) $(WITH_DATA) $(WITH_JSON) $(ARGS)

bench-path: setup  ## CPU of a decision on the event loop and in the journal's thread, without network and model servers (ARGS='--way unary --rounds 5')
	$(BIN)/python -m local.bench.path_cpu $(ARGS)

bench-client: setup  ## what the Python client costs its callers, next to raw stubs, and what shared calls and a stream gain (ARGS='--target HOST:PORT')
	$(BIN)/python -m local.bench.client $(ARGS)

bench-client-js: js  ## the same of the JavaScript client in Node (ARGS='--target HOST:PORT')
	$(BIN)/python -m local.bench.client_js $(ARGS)

bench-faults: setup  ## the figures that are claimed of a server in trouble, on a machine with nothing else to do (EDGE=envoy ARGS='-k ten')
	$(if $(EDGE),TEST_EDGE=$(EDGE)) $(BIN)/python -m pytest tests/faults tests/integration -m '' --figures $(ARGS)

bench-flips: setup  ## how fast a change reaches every process of two servers under load (JSON=file)
	$(BIN)/pretrade bench-flips $(WITH_DATA) $(WITH_JSON)

bench-features: setup  ## the feature worker: steps next to pandas, events a second from Kafka, freshness (DATA=dir JSON=file)
	$(BIN)/pretrade bench-features $(WITH_DATA) $(WITH_JSON)

bench-guests: setup  ## how late mf1 takes its events in beside computed feature sets, and what these take (ARGS='--rounds 5 --rate 5000')
	$(BIN)/python -m local.bench.guests $(ARGS)

bench-copy: setup  ## what a server's copy of 200 busy instruments takes of one core (ARGS='--instruments 50 --rounds 3')
	$(BIN)/python -m local.bench.feature_copy $(ARGS)

bench-indicators: setup  ## what the feature set ta1 takes of one core for a hundred instruments (ARGS='--instruments 100 --rate 50')
	$(BIN)/python -m local.bench.ta1 $(ARGS)

bench-lookups: setup  ## how long the audit takes to find decisions among millions of one day, and in a journal (ROWS=50000000 JOURNAL_GIB=10 JSON=file)
	$(BIN)/pretrade bench-lookups $(if $(ROWS),--rows $(ROWS)) $(if $(JOURNAL_GIB),--journal-gib $(JOURNAL_GIB)) $(WITH_JSON)

bench-serving: setup  ## model serving: runtimes in process, TorchServe by rows and by setting (JSON=file)
	$(BIN)/pretrade bench-serving $(WITH_JSON)

soak: setup  ## half an hour under load: do memory, descriptors, tasks and latency stay flat? (EDGE=grpcio ARGS='--rate 300')
	$(if $(EDGE),PRETRADE_GRPC__EDGE=$(EDGE)) $(BIN)/pretrade soak $(ARGS)
