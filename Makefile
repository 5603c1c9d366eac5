# `make demo` and `make test` need python3 (>= 3.11, with venv) and make; uv is used when present.

PYTHON ?= python3

# Each purpose has an environment of its own, complete once its stamp is there.
demo_python := .venv/demo/bin/python
test_python := .venv/test/bin/python
nox_python := .venv/nox/bin/python
lint_python := .venv/lint/bin/python
bench_python := .venv/bench/bin/python
docs_python := .venv/docs/bin/python

# What `make requirements` pins for each purpose: a dependency group and the extras it needs.
demo_extras := postgresql fastapi asyncio
test_extras := $(demo_extras) mysql testing flask litestar starlette
lint_extras := $(test_extras)
bench_extras := $(test_extras)
bench-fastapi-sqla_extras := $(demo_extras)

# Each is a target of its own, faults-NAME.
fault_suites := state-machine calls sqlalchemy server nemesis soak

.PHONY: help demo test test-all fuzz jobs pooler init-test faults faults-state-machine faults-calls faults-sqlalchemy faults-server faults-nemesis faults-soak lint docs reference bench scorecard requirements clean
.DELETE_ON_ERROR:
.NOTPARALLEL:

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

demo: .venv/demo/ready ## serve the example shop on http://127.0.0.1:8000 (PORT, DATABASE_URL)
	@cd examples && PYTHONPATH=../src exec ../$(demo_python) -m shop.demo

test: .venv/test/ready ## run all tests (ARGS="-k name" goes to pytest)
	@$(test_python) -m pytest -n 3 --dist loadfile $(ARGS)

test-all: .venv/nox/ready ## run all tests in every corner (ARGS="-l" lists them)
	@$(nox_python) -m nox $(ARGS)

fuzz: .venv/test/ready ## feed the checker 10,000 programs
	@FUZZ_PROGRAMS=10000 $(test_python) -m pytest --timeout=0 -o faulthandler_timeout=0 \
		tests/check/test_any_program.py

jobs: .venv/test/ready ## run 2,000 Celery tasks on Redis and RabbitMQ, and kill workers
	@CI=true JOBS_TASKS=2000 $(test_python) -m pytest --timeout=0 -o faulthandler_timeout=0 -s \
		tests/jobs/test_celery.py -k killed

init-test: .venv/test/ready ## time `sessionscope init` to a running app, in fresh environments
	@INIT_TEST=1 $(test_python) -m pytest --timeout=0 -o faulthandler_timeout=0 -s \
		tests/test_init.py -k running_application

faults: .venv/test/ready ## run all fault suites, one after the other; works without a terminal
	@$(MAKE) --no-print-directory -k $(addprefix faults-,$(fault_suites))

faults-server: .venv/test/ready ## kill, stop, fill and starve servers (SERVER_FAULTS_ROUNDS=5)
	@CI=true SERVER_FAULTS_ROUNDS=$(or $(SERVER_FAULTS_ROUNDS),5) $(test_python) -m pytest --timeout=0 \
		-o faulthandler_timeout=0 -s tests/faults/test_server_faults.py

faults-nemesis: .venv/test/ready ## break everything under writing clients (NEMESIS_SECONDS=200, NEMESIS_SEEDS="1 2 3")
	@failed=0; for seed in $(or $(NEMESIS_SEEDS),1 2 3); do PYTHONPATH=src $(test_python) -m tests.faults.nemesis \
		--seconds $(or $(NEMESIS_SECONDS),200) --seed $$seed || failed=1; done; exit $$failed

faults-soak: .venv/test/ready ## let very many units leave nothing behind (SOAK_UNITS=100000)
	@PYTHONPATH=src $(test_python) -m tests.faults.soak --units $(or $(SOAK_UNITS),100000)

pooler: .venv/test/ready ## run 10,000 units of each driver through PgBouncer
	@CI=true POOLER_UNITS=10000 $(test_python) -m pytest --timeout=0 -o faulthandler_timeout=0 \
		tests/test_pgbouncer.py

faults-state-machine: .venv/test/ready ## take 100,000 steps at random beside a dict and a plain session
	@CI=true STATE_MACHINE_STEPS=100000 $(test_python) -m pytest --timeout=0 -o faulthandler_timeout=0 -s \
		tests/faults/test_state_machine.py

faults-calls: .venv/test/ready ## let the driver fail at every call, and at every pair of calls
	@CI=true CALLS_FAULTS=2 $(test_python) -m pytest --timeout=0 -o faulthandler_timeout=0 -s \
		tests/faults/test_every_call.py

faults-sqlalchemy: .venv/test/ready ## run SQLAlchemy's own tests with our sessions, on six drivers
	@CI=true SQLALCHEMY_SUITE=all $(test_python) -m pytest --timeout=0 -o faulthandler_timeout=0 -s \
		tests/faults/test_sqlalchemy_suite.py

lint: .venv/lint/ready ## check style, format and types
	@$(lint_python) -m ruff check .
	@$(lint_python) -m ruff format --check .
	@$(lint_python) -m mypy
	@$(lint_python) -m pyright --pythonpath $(lint_python)
	@PYTHONPATH=src $(lint_python) -m sessionscope check src examples
	@$(lint_python) -m pytest -q tests/test_init.py -k style

docs: .venv/docs/ready ## build the documentation in build/site; a broken link fails
	@$(docs_python) -m zensical build --strict --clean

reference: ## write docs/reference anew from the docstrings
	@$(PYTHON) scripts/reference.py

bench: .venv/bench/ready ## run the benchmarks (ARGS go to them)
	@PYTHONPATH=src $(bench_python) -m benchmarks $(ARGS)

scorecard: ## print how the code reads, in numbers
	@$(PYTHON) scripts/scorecard.py

.venv/%/ready: requirements/%.txt
	@sh scripts/environment.sh $*

requirements: ## pin the newest versions of all dependencies (needs uv)
	@$(foreach name,demo test nox lint docs bench bench-fastapi-sqla,uv pip compile pyproject.toml --quiet --upgrade --universal \
		--python-version 3.11 --generate-hashes --no-emit-index-url --no-header \
		--group $(name) $(addprefix --extra ,$($(name)_extras)) -o requirements/$(name).txt &&) true

clean: ## remove the environments and all caches
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .sessionscope_cache .hypothesis .cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
