# Two commands: `make demo` and `make test`. Both create .venv themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint types headline clean

demo: $(READY)
	$(BIN)/slimlmm demo --out runs/demo

test: $(READY)
	$(BIN)/ruff check src tests benchmarks scripts
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# hours on 2 cores, minutes on a GPU; stop it at any time, the same command resumes
headline: $(READY)
	$(BIN)/python benchmarks/headline.py --out runs/headline

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("slimlmm needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) runs build *.egg-info
