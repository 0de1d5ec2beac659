# Everything a contributor runs.  `make help` lists it.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
# A requirement that narrows the Django version, for example DJANGO='Django>=5.2,<5.3'.
DJANGO ?= Django
# More arguments for pytest, for example ARGS='-k fencing -x'.
ARGS ?=

PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
PACKAGES := $(patsubst %/__init__.py,%,$(wildcard */__init__.py))
HAS_MYSQL_HEADERS = command -v mariadb_config || command -v mysql_config \
	|| pkg-config --exists libmariadb || pkg-config --exists mysqlclient

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help venv demo test check format bench docs clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	@if { $(HAS_MYSQL_HEADERS); } >/dev/null 2>&1; then extras=dev,postgresql,mysql; else \
		extras=dev,postgresql; \
		echo "Left out the MariaDB/MySQL driver: no mariadb_config, mysql_config or pkg-config" \
			"entry found (Debian: apt install libmariadb-dev pkg-config)."; \
	fi; \
	echo "Installing django-firefly-jobs[$$extras] into $(VENV)"; \
	$(PY) -m pip install --quiet -e ".[$$extras]" "$(DJANGO)"
	@touch $@

venv: $(STAMP) ## Make the virtual environment (VENV=.venv PYTHON=python3)

demo: $(STAMP) ## Try it: a small project, a consumer and the admin
	@$(PY) -m testproject.demo

test: $(STAMP) ## Run the tests on every database that answers (ARGS='-k …')
	@$(PY) -m tests $(ARGS)

check: $(STAMP) ## Lint, format, types, layers, migrations
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	FIREFLY_TESTING=1 $(PY) -m mypy manage.py $(PACKAGES)
	$(VENV)/bin/lint-imports --no-cache
	FIREFLY_TESTING=1 FIREFLY_DATABASE=sqlite:///:memory: $(PY) manage.py makemigrations --check --dry-run

format: $(STAMP) ## Format the code and fix what can be fixed by itself
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(STAMP) ## Run the benchmarks (ARGS='drain --database sqlite')
	@$(PY) -m benchmarks $(or $(ARGS),all --without chaos --without workflow-chaos --without schedule-chaos)

docs: $(STAMP) ## Test the documentation: snippets, names, links
	@$(PY) -m pytest tests/docs $(ARGS)

clean: ## Remove the virtual environment, caches and the demo's database
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage .coverage.* build dist
	rm -f db.sqlite3* demo.sqlite3*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
