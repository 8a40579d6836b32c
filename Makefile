# make course: set up on first use, run all notebooks (profile orl) into build/, write build/index.html
# make test:   set up on first use, run the whole test suite
# make site:   render notebooks, records and the package's pages into build/site
# make test-faults: kills, full disks, broken files and hostile students, also those that take minutes
# make test-browser: the site and JupyterLab in a real browser
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# another build of torch, by uv: cpu, cu130, …; by default the locked one, which on Linux is for CUDA
TORCH ?=
# processes that share the tests, each with one thread and about 3 GB of memory
WORKERS ?= 2

# how torch's threads wait and how memory is kept: faceadv/store/threads.py says why
SETTINGS := GOMP_SPINCOUNT=1000 MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=2147483647
$(foreach setting,$(SETTINGS),$(eval export $(setting)))

course: $(VENV)/done
	$(BIN)/faceadv run all --profile orl

test: $(VENV)/done
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-faults: $(VENV)/done
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "long or not long" tests/faults

setup: $(VENV)/done

# exactly what is locked: no resolving, every hash checked; uv where there is one, which is faster
$(VENV)/done: requirements.txt $(wildcard requirements/*.txt) pyproject.toml
	$(PYTHON) -m venv --clear $(VENV)
	if [ -n "$(TORCH)" ]; then \
	  command -v uv >/dev/null || { echo "TORCH=$(TORCH) needs uv: pip install uv"; exit 1; }; \
	  uv pip install -q --python $(BIN)/python --torch-backend $(TORCH) \
	    $$(grep -oE '^torch(vision)?==[0-9.]+' requirements/torch.txt) && \
	  uv pip install -q --python $(BIN)/python --no-deps --require-hashes -r requirements/rest.txt; \
	elif command -v uv >/dev/null; then uv pip sync -q --python $(BIN)/python --require-hashes requirements.txt; \
	else $(BIN)/python -m pip install -q --no-deps --require-hashes -r requirements.txt; fi
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	$(BIN)/python -m ipykernel install --sys-prefix $(foreach setting,$(SETTINGS),--env $(subst =, ,$(setting))) >/dev/null
	touch $@

# after a change of pyproject.toml's dependencies
lock:
	mkdir -p build && cat requirements/*.txt > build/lock.txt
	uv pip compile -q --universal --python-version 3.11 --generate-hashes --extra dev --extra site pyproject.toml \
	  -o build/lock.txt
	awk '/^[a-z0-9]/ {torch = /^(torch|torchvision|triton|nvidia-[a-z0-9-]*|cuda-[a-z]*)==/} \
	  !/^#/ {print > ("requirements/" (torch ? "torch" : "rest") ".txt")}' build/lock.txt

# write records into results/ and the outputs that people read into notebooks/; needs LFW, which 00 to 02 are read on
update: $(VENV)/done
	$(BIN)/faceadv run all --update
	$(BIN)/faceadv run 00 01 02 --profile lfw --update

site: $(VENV)/done
	$(BIN)/python docs/build.py

# apart from the other tests, as it needs a browser; installs Debian's if there is none
test-browser: site
	command -v chromium >/dev/null || command -v google-chrome >/dev/null || \
	  { echo "Installing Chromium (apt-get install chromium)"; apt-get update -qq && apt-get install -y -qq chromium; } || \
	  { echo "Chromium or Chrome must be installed, and on the PATH."; exit 1; }
	$(BIN)/python -m pytest browser

.PHONY: course test test-faults setup lock update site test-browser
