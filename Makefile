.PHONY: help run test check chaos docs lock audit

help:
	@echo 'make run     the whole service, with its own PostgreSQL and Valkey unless you name others'
	@echo 'make test    every test (ARGS="tests/unit -k fold" for some)'
	@echo 'make bench   how fast it is (ARGS="intake floors --runs 1" for some parts)'
	@echo 'make check   what a reviewer would run: lint, format, types, import contracts, unit tests'
	@echo 'make chaos   the service under faults for five minutes, and a report (SEED=2 ARGS=--control)'
	@echo 'make docs    docs/reference anew, where it is made from the code'
	@echo 'make lock    the lock files anew from setup.cfg (ARGS=--upgrade for the newest versions)'
	@echo 'make audit   asks PyPI for known weaknesses of what is in requirements.lock'

run:
	@tools/setup.sh
	@exec .venv/bin/positions up

test:
	@tools/setup.sh dev
	.venv/bin/pytest $(ARGS)

bench:
	@tools/setup.sh dev
	.venv/bin/python -m benchmarks $(ARGS)

check:
	@tools/setup.sh dev
	.venv/bin/python -m pip check
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	.venv/bin/lint-imports
	.venv/bin/pytest tests/unit

chaos:
	@tools/setup.sh dev
	.venv/bin/python -m tests.chaos --seed $(or $(SEED),1) $(ARGS)

docs:
	@tools/setup.sh dev
	.venv/bin/python -m tools.reference

lock:
	@tools/setup.sh dev
	@tools/lock.sh $(ARGS)

audit:
	@tools/setup.sh dev
	@.venv/bin/python -m venv .venv/audit
	@.venv/audit/bin/pip install --quiet --disable-pip-version-check pip-audit
	.venv/audit/bin/pip-audit --requirement requirements.lock --disable-pip --require-hashes --strict
