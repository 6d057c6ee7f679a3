# Two commands: `make demo` and `make test`. Both set up a virtual environment in .venv first; nothing else is touched.
#   make demo                the model `tiny`, which comes with the package: pictures, table, curves on one page, in three minutes
#   make demo SCRATCH=1      everything trained from scratch first, in ten (and so, as long as no model comes with the package)
#   make demo DEMO="--data ~/Pictures --minutes 30 --out runs/mine"    the same job on your own pictures
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu    a CPU-only PyTorch (1 GB instead of 6)
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
SHIPPED := $(wildcard flextok_edu/zoo/*/model.json)
# Whoever says with DEMO how to train, trains; and so does everybody while no model comes with the package.
ifndef SCRATCH
SCRATCH := $(if $(DEMO),1,$(if $(SHIPPED),0,1))
endif
DEMO   ?= --data scenes --preset micro --out runs/$(if $(SHIPPED),scratch,demo) --at-most 9.5
JOB    := $(if $(filter-out 0 no,$(SCRATCH)),flextok_run $(DEMO),flextok_demo --out runs/demo)
TORCH  := torch torchvision
INDEX  := $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX),)
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test check clean
demo: $(VENV)/.installed-demo
	$(BIN)/$(JOB)

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
	$(PIP) -e '.[metrics,data,text,dev]'
	@touch $@ $(VENV)/.installed-demo

clean:
	rm -rf $(VENV) build dist *.egg-info
