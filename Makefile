# Two commands: `make demo` and `make test`. Both set up a virtual environment in .venv first; nothing else is touched.
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu    a CPU-only PyTorch (1 GB instead of 6)
#   make demo DEMO="--data ~/Pictures --minutes 30 --out runs/mine"    the same job on your own pictures
PYTHON ?= python3
VENV   ?= .venv
DEMO   ?= --data scenes --preset micro --out runs/demo --at-most 9.5
BIN    := $(VENV)/bin
TORCH  := torch torchvision
INDEX  := $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX),)
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test check clean
demo: $(VENV)/.installed-demo
	$(BIN)/flextok_run $(DEMO)

test: $(VENV)/.installed-dev
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tools/check.py

# PyTorch comes first and by itself, so that TORCH_INDEX concerns nothing else.
$(VENV)/.installed-torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing PyTorch (once, some minutes) ..."
	$(PIP) $(INDEX) $(TORCH)
	@touch $@
$(VENV)/.installed-demo: $(VENV)/.installed-torch settings.ini setup.py
	$(PIP) -e '.[metrics]'
	@touch $@
$(VENV)/.installed-dev: $(VENV)/.installed-torch settings.ini setup.py
	@echo "installing the development tools ..."
	$(PIP) -e '.[metrics,dev]'
	@touch $@ $(VENV)/.installed-demo

clean:
	rm -rf $(VENV) build dist *.egg-info
