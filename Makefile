# Every command of the README is a target here. `make help` lists them.
SHELL := /bin/bash
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=
.DEFAULT_GOAL := help

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

# --- set-up ---------------------------------------------------------------------------------------------------------

$(STAMP): setup.cfg pyproject.toml constraints.txt
	@scripts/check_prerequisites.sh "$(PYTHON)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing torch, then the pinned packages (about two minutes, 2 GB below $(VENV))"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch==2.13.0 setuptools wheel
	@DS_BUILD_OPS=0 $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

setup: $(STAMP) ## make .venv with pinned versions (other targets do it by themselves)

# --- the two commands -------------------------------------------------------------------------------------------------

sweep: $(STAMP) ## the default sweep: about 15 minutes on two cores, ends with the allocation curve (ARGS="sweep.seeds=[0,1,2]")
	@$(BIN)/python -m sweeps.run sweep=default action=run $(ARGS)

test: $(STAMP) ## lint, types and the fast tests
	@$(MAKE) --no-print-directory check
	@$(BIN)/python -m pytest -n 2 -m "not slow and not gpu and not distributed_full" $(ARGS)

# --- more ---------------------------------------------------------------------------------------------------------------

sweep-plan: $(STAMP) ## print every trial of the default sweep without training (ARGS="sweep=long")
	@$(BIN)/python -m sweeps.run sweep=default action=plan $(ARGS)

sweep-long: $(STAMP) ## about 2 hours: four seeds, every control, learning rates x0.5 and x2
	@$(BIN)/python -m sweeps.run sweep=long action=run $(ARGS)

ladder: $(STAMP) ## dense, Hash, Switch, GShard, DeepSeekMoE, Engram, OverEncoding and controls at equal FLOPs: half an hour
	@$(BIN)/python -m sweeps.ladder run $(ARGS)

ladder-plan: $(STAMP) ## print every trial of the ladder without training (ARGS="--file my_ladder.yaml")
	@$(BIN)/python -m sweeps.ladder plan $(ARGS)

smoke: $(STAMP) ## the whole path in about 2 minutes; claims nothing
	@$(BIN)/python -m sweeps.run sweep=smoke data=tiny action=run $(ARGS)

report: $(STAMP) ## rebuild a sweep's report from its folders as they are (SWEEP=runs/default)
	@$(BIN)/python -m sweeps.report $(or $(SWEEP),runs/default) $(ARGS)

prepare: $(STAMP) ## tokenise the corpus (ARGS="data=datasets data.data_files=[my.jsonl]")
	@$(BIN)/python -m scripts.prepare_data $(ARGS)

train: $(STAMP) ## train one model, on RANKS processes if given (RANKS=2 ARGS="model=tiny_engram train.max_steps=200 run_dir=runs/mine")
	@$(if $(RANKS),$(BIN)/torchrun --standalone --nproc_per_node $(RANKS),$(BIN)/python) -m train.pretrain $(ARGS)

# An empty path would be taken for the current folder.
need = $(if $($(1)),,$(error $(1)= is empty; give it, for instance $(1)=$(2)))

import: $(STAMP) ## a Hugging Face DeepSeek-V3 or Dots1, or a run without memory, as a start (FROM=hf_folder TO=imports/x ARGS="--engram tiny_engram")
	$(call need,FROM,hf_folder)$(call need,TO,imports/mine)
	@$(BIN)/python -m scripts.import_hf "$(FROM)" "$(TO)" $(ARGS)

continue: $(STAMP) ## train on from an import's or a run's weights (FROM=imports/x ARGS="run_dir=runs/mine train.max_steps=200")
	$(call need,FROM,imports/mine)
	@$(BIN)/python -m train.pretrain --config-path "$(FROM)" --config-name config init_from="$(FROM)" init_sha256=null init_changes=[] run_dir="$(FROM:%/=%)-continued" $(ARGS)

export: $(STAMP) ## the newest weights of a run in one folder of safetensors, to hand on (RUN=runs/mine TO=exports/mine ARGS="--average")
	$(call need,RUN,runs/mine)$(call need,TO,exports/mine)
	@$(BIN)/python -m train.export "$(RUN)" "$(TO)" $(ARGS)

generate: export ENGRAM_PROMPT = $(value PROMPT)
generate: $(STAMP) ## continue a text with a trained model (RUN=runs/mine PROMPT='def main(')
	$(call need,RUN,runs/mine)
	@$(BIN)/python -m train.generate "$(RUN)" $(ARGS)

params: $(STAMP) ## parameters, FLOPs and bytes per device of a preset (MODEL=engram_27b ARGS="--zero 1 --world-size 64")
	@$(BIN)/python -m scripts.params $(or $(MODEL),tiny) $(ARGS)

bench: $(STAMP) ## training step against Hugging Face, dense AdamW and table sizes; fallbacks of the kernels against naive forms
	@$(BIN)/python -m scripts.bench_train $(ARGS)
	@[ $$(nproc) -eq 1 ] || $(BIN)/python -m scripts.bench_train --threads $$(nproc) $(ARGS)
	@$(BIN)/python -m scripts.bench_memory $(ARGS)
	@$(BIN)/python -m scripts.bench_kernels $(ARGS)

bench-host: $(STAMP) ## training step with table rows on the device, in RAM and in a file, 1e6 to 1e8 rows: 12 GiB (ARGS="--rows 1000000")
	@$(BIN)/python -m scripts.bench_host_table $(ARGS)

# Makes no .venv: a machine with a GPU often comes with its own torch and Triton. PYTHON=... says which, or BIN=<folder>.
bench-gpu: ## check and time the Triton kernels and training steps on a GPU; torch 2.13 and Triton 3.7 are enough (ARGS="--quick")
	@$(or $(if $(filter command environment,$(origin PYTHON)),$(PYTHON)),$(wildcard $(BIN)/python),$(PYTHON)) -m scripts.bench_gpu $(ARGS)

calibrate: $(STAMP) ## simulate the fit: coverage, false-U rate and power
	@$(BIN)/python -m scripts.calibrate_fit $(ARGS)

check: $(STAMP) ## lint, format and types
	@$(BIN)/ruff check -q . && $(BIN)/ruff format -q --check . && $(BIN)/mypy

format: $(STAMP) ## format in place
	@$(BIN)/ruff check -q --fix . ; $(BIN)/ruff format -q .

test-slow: $(STAMP) ## the slower tests
	@$(BIN)/python -m pytest -n 2 -m "slow and not gpu" $(ARGS)

test-distributed-full: $(STAMP) ## every combination of ranks, ZeRO stages, experts and accumulation against one process (minutes)
	@$(BIN)/python -m pytest -m distributed_full $(ARGS)

clean: ## remove caches (not data/, not runs/)
	@rm -rf .mypy_cache .ruff_cache .pytest_cache build *.egg-info; find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

.PHONY: help setup sweep test sweep-plan sweep-long ladder ladder-plan smoke report prepare train import continue export generate params bench bench-host bench-gpu \
	calibrate check format test-slow test-distributed-full clean
