# Two commands: `make demo` and `make test`. Both create .venv themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test results faults conformance lint types headline clean

demo: $(READY)
	$(BIN)/slimlmm demo --out runs/demo

test: $(READY)
	$(BIN)/ruff check src tests benchmarks scripts
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# every law for every family and axis, a few minutes on 2 cores; docs/families.md is written anew and has to be what is committed
conformance: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/conformance.py docs/families.md --workers 2 --check
	$(BIN)/python -m pytest --whole-grid --thorough --numprocesses 2 --dist load

# docs/results.md and its plots, from the committed records of studies, in this order
STUDIES := stages frontier visits batches orders planner schedule-4x sizes-18x sizes-by-18x small few-4x losses units
results: $(READY)
	$(BIN)/slimlmm study $(STUDIES:%=benchmarks/results/study-%.json) --page docs/results.md

# kills, full disks and spoilt bytes at random, an hour and a half on 2 cores, then the test of every fault of docs/reliability.md,
# which is written anew
faults: $(READY)
	mkdir -p runs
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/faults.py --kills 50 --out runs/faults.json
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/faults_more.py --kills 10 --fills 10 --out runs/faults-more.json
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/fuzz.py --n 10000 --out runs/fuzz.json
	$(BIN)/python benchmarks/reliability.py docs/reliability.md \
		--faults runs/faults.json --more runs/faults-more.json --fuzz runs/fuzz.json

# hours on 2 cores, minutes on a GPU; stop it at any time, the same command resumes
headline: $(READY)
	$(BIN)/python benchmarks/headline.py --out runs/headline

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("slimlmm needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,serve]'
	touch $(READY)

clean:
	rm -rf $(VENV) runs build *.egg-info
