# On Windows, run these commands as they stand.
PYTHON = .venv/bin/python

.PHONY: test quick style tables

test:                   # everything, in a few minutes
	$(PYTHON) -m pytest -n auto

quick:                  # what takes seconds and no download
	$(PYTHON) -m pytest -m "not slow and not network"

style:
	$(PYTHON) -m ruff check .

tables:                 # do the pages say what assets/results says?
	$(PYTHON) -m minisa.lab.experiments --check
