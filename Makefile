# Two commands for a newcomer: `make demo` and `make test`. Both set up their own environment in .venv first.
PYTHON ?= python3
DATA ?= auto
VENV := .venv
PY := $(VENV)/bin/python

.PHONY: demo test lint clean

# rebuilt whenever what is installed changes
$(VENV)/ready: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $@

demo: $(VENV)/ready
	$(PY) -m demo --data $(DATA)

test: $(VENV)/ready lint
	$(PY) -m pytest -n 2 --dist loadfile  # two processes, a file of tests each

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf build .venv
