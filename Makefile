# `make demo` and `make test` need nothing but Python 3.10 or newer: they make the virtual environment themselves.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO_INSTALLED := $(VENV)/.installed-demo
VENV5 ?= .venv-transformers5
VENV_LOWEST ?= .venv-lowest
# The oldest Python that the project runs on, where there is one.
PYTHON_LOWEST ?= $(shell python3.10 -c '' 2>/dev/null && echo python3.10 || echo $(PYTHON))
OUT ?= demo

.PHONY: demo demo-formats demo-cache test test-transformers5 test-lowest arm lint types fuzz chaos clients bench docs clean

# Nothing is compiled ahead: most of what the libraries bring is never imported.
# The demo needs no more than this; what the tests need besides takes minutes to install.
$(DEMO_INSTALLED): EXTRA = export
$(INSTALLED): EXTRA = all
$(DEMO_INSTALLED) $(INSTALLED): pyproject.toml constraints.txt constraints-transformers4.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --constraint constraints-transformers4.txt \
		--editable '.[$(EXTRA)]'
	touch $@

$(VENV5)/.installed: pyproject.toml constraints.txt constraints-transformers5.txt
	$(PYTHON) -m venv $(VENV5)
	$(VENV5)/bin/python -m pip install --quiet --no-compile --constraint constraints.txt --constraint constraints-transformers5.txt \
		--editable '.[dev,genai]'
	touch $@

$(VENV_LOWEST)/.installed: pyproject.toml constraints-lowest.txt
	$(PYTHON_LOWEST) -m venv $(VENV_LOWEST)
	$(VENV_LOWEST)/bin/python -m pip install --quiet --no-compile --constraint constraints-lowest.txt --editable '.[dev,optimum]'
	touch $@

# Train, export several ways, generate, compare: the table and plot of the README.
demo: $(DEMO_INSTALLED)
	$(BIN)/expe-edge train --preset tiny --out $(OUT)/checkpoint --force
	$(MAKE) --jobs=2 demo-formats demo-cache
	$(BIN)/expe-edge generate $(OUT)/package/int8-dynamic --prompt 'def read_file(path):' \
		--max-new-tokens 128 --temperature 0.7 --min-p 0.05 --seed 1
	$(BIN)/expe-edge compare $(OUT)/package/float32 $(OUT)/package/int8-dynamic $(OUT)/package/int8-static \
		$(OUT)/package/int8-dynamic-int8-cache $(OUT)/package/int4-weight \
		--json $(OUT)/comparison.json --plot $(OUT)/comparison.png
	@echo "the model is in $(OUT)/checkpoint, its packages in $(OUT)/package; run $(BIN)/expe-edge --help for more"

# Side by side, one thread each: half of an export is imports, tokenizing and other work that knows no threads. Progress bars of
# two would overwrite one another.
demo-formats demo-cache: export OMP_NUM_THREADS = 1
demo-formats demo-cache: export TERM = dumb

demo-formats demo-cache: $(DEMO_INSTALLED)

demo-formats:
	$(BIN)/expe-edge export $(OUT)/checkpoint --out $(OUT)/package --force \
		--precision float32 --precision int8-dynamic --precision int8-static --precision int4-weight

demo-cache:
	$(BIN)/expe-edge export $(OUT)/checkpoint --out $(OUT)/package --force --precision int8-dynamic --cache int8

test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

# The same beside transformers 5; lists the tests skipped for want of Optimum.
test-transformers5: $(VENV5)/.installed
	$(VENV5)/bin/python -m pytest --numprocesses 2 --dist worksteal -rs

# The same with the oldest of every range in pyproject.toml, and lists what an old onnxruntime has no kernels for.
test-lowest: $(VENV_LOWEST)/.installed
	$(VENV_LOWEST)/bin/python -m pytest --numprocesses 2 --dist worksteal -rs

# Packages on an Arm processor, which qemu stands in for: made once, of Debian's packages and wheels, in .arm/.
arm: $(INSTALLED)
	test -d .arm/site/onnxruntime || $(BIN)/python -m benchmarks.arm setup
	$(BIN)/python -m pytest -rs tests/runtime/test_arm.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

# Changed inputs of every kind, a hundred thousand; and runs killed at random moments, a thousand. Each takes most of an hour;
# SECONDS=60 ends it after a minute.
fuzz: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.fuzz $(if $(SECONDS),--seconds $(SECONDS))

chaos: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.chaos $(if $(SECONDS),--seconds $(SECONDS))

# Every client with every kind of package: the table of docs/clients.md. What of pip it needs goes to the user's caches, what of npm among temporary files.
clients: $(INSTALLED) $(OUT)/checkpoint/training.json
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.clients $(OUT)/checkpoint

$(OUT)/checkpoint/training.json: | $(DEMO_INSTALLED)
	$(BIN)/expe-edge train --preset tiny --out $(OUT)/checkpoint --force

# Long experiments; see the head of each file in studies/ and benchmarks/.
bench: $(INSTALLED)
	$(BIN)/expe-edge reproduce studies/encodings.yaml
	$(BIN)/python -m benchmarks.runtime_overhead
	$(BIN)/python -m benchmarks.peers
	$(BIN)/python -m benchmarks.serving
	$(BIN)/expe-edge train --config examples/plain-slopes.yaml --out runs/plain --force
	$(BIN)/python -m benchmarks.quantization runs/plain --out runs/quantization
	$(BIN)/python -m benchmarks.off_the_shelf runs/plain
	$(BIN)/python -m benchmarks.portable $(OUT)/checkpoint
	$(BIN)/python -m benchmarks.export_memory
	$(BIN)/python -m benchmarks.exqpe

# Pages generated from the code: docs/cli.md and docs/api.md.
docs: $(INSTALLED)
	$(BIN)/python -m docs.generate

clean:
	rm -rf $(VENV) $(VENV5) $(VENV_LOWEST) build dist *.egg-info $(OUT)
