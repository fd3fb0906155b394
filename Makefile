# make demo    the whole story on this machine's CPU, five minutes on two idle cores
# make test    the tests, without torch; XLA optimises little, since compiling is most of the time (parity: all of it)
# make compiled  the published steps and decoding, compiled for TPUs: nothing has grown
# make corruptions  a checkpoint damaged in 200 ways, half a minute: none is restored wrong
# make faults  the same, and processes that are stopped, killed and stuck, bad rows and updates, about 15 minutes
# make storm   two processes killed 30 times on the way to update 300, about ten minutes
# make hostile 300 hostile model folders, 10,000 damaged images and rows, about three minutes: each is one line
# make parity  the comparison with torch and transformers, today's and 4.46.3
# make ecosystem  exports in the programs of others, each in an environment of its own: ids, targets, answers, logits
# make bench   speed and memory beside torch and transformers
# make page    the page of serve in headless Chromium, with screenshots: make page MODEL=demo_run/finetune
# make report  the page of `evaluate report` in headless Chromium, with screenshots
# make load    many clients on serve, then schemathesis: make load MODEL=demo_run/finetune
# make docs    the documentation, warnings as errors, its notebooks executed
# make package wheel and sdist, each installed into an empty environment and used in an empty folder
# make lint    ruff, its format, who may import whom (import-linter), and make types
# make types   ty over the package
#
# Each target sets up its own environment (.venv, .venv-parity, .venv-parity-446) and does so again only when a
# requirements file or the Python changes: make test PYTHON=python3.12.

.PHONY: demo test compiled corruptions faults storm hostile parity ecosystem bench page report load docs package lint types
.DELETE_ON_ERROR:

# The first of these that runs and is new enough; `make PYTHON=/path/to/python test` overrides it.
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
DEMO ?= demo_run
MODEL ?= $(DEMO)/finetune

demo: .venv/.runtime
	JAX_PLATFORMS=cpu .venv/bin/python -m llava_jax demo --workdir=$(DEMO)

$(DEMO)/report.json:
	$(MAKE) demo

test: .venv/.dev
	JAX_PLATFORMS=cpu JAX_DISABLE_MOST_OPTIMIZATIONS=1 .venv/bin/python -m pytest -q -n 2 --dist worksteal

compiled: .venv/.dev
	.venv/bin/python -m pytest -q tests/compiled

corruptions: .venv/.dev
	JAX_PLATFORMS=cpu .venv/bin/python -m tests.faults.corruptions

faults: corruptions
	JAX_PLATFORMS=cpu .venv/bin/python -m tests.faults.processes
	JAX_PLATFORMS=cpu .venv/bin/python -m tests.faults.terms
	JAX_PLATFORMS=cpu .venv/bin/python -m tests.faults.rejects
	JAX_PLATFORMS=cpu .venv/bin/python -m tests.faults.nonfinite
	JAX_PLATFORMS=cpu .venv/bin/python -m tests.faults.layouts

storm: .venv/.dev
	JAX_PLATFORMS=cpu .venv/bin/python -m tests.faults.storm

hostile: .venv/.dev
	JAX_PLATFORMS=cpu .venv/bin/python -m tests.faults.hostile_models
	JAX_PLATFORMS=cpu .venv/bin/python -m tests.faults.mutated_rows

parity: .venv-parity/.parity .venv-parity-446/.parity
	JAX_PLATFORMS=cpu .venv-parity/bin/python -m pytest -q tests/parity

FOREIGN := $(patsubst %,.venv-ecosystem-%/.ready,transformers trl lmms-eval easydel)
ecosystem: .venv/.dev $(DEMO)/report.json $(FOREIGN) .venv-ecosystem-vllm/.ready .venv-ecosystem-llama-cpp/.ready
	rm -rf build/ecosystem
	JAX_PLATFORMS=cpu .venv/bin/python -m tests.ecosystem.make_export build/ecosystem $(DEMO)
	HF_HUB_OFFLINE=1 .venv-ecosystem-transformers/bin/python tests/ecosystem/check_transformers.py build/ecosystem
	HF_HUB_OFFLINE=1 .venv-ecosystem-trl/bin/python tests/ecosystem/check_trl.py build/ecosystem
	HF_HUB_OFFLINE=1 JAX_PLATFORMS=cpu .venv-ecosystem-lmms-eval/bin/python tests/ecosystem/check_lmms_eval.py \
		build/ecosystem
	HF_HUB_OFFLINE=1 VLLM_ENABLE_V1_MULTIPROCESSING=0 .venv-ecosystem-vllm/bin/python tests/ecosystem/check_vllm.py \
		build/ecosystem
	HF_HUB_OFFLINE=1 NO_LOCAL_GGUF=1 .venv-ecosystem-llama-cpp/bin/python tests/ecosystem/check_llama_cpp.py \
		build/ecosystem .venv-ecosystem-llama-cpp/source
	HF_HUB_OFFLINE=1 JAX_PLATFORMS=cpu .venv-ecosystem-easydel/bin/python tests/ecosystem/check_easydel.py build/ecosystem

bench: .venv/.runtime .venv-parity/.parity
	JAX_PLATFORMS=cpu .venv/bin/python -m llava_jax benchmark train --peer
	JAX_PLATFORMS=cpu .venv/bin/python -m llava_jax benchmark generate --peer
	JAX_PLATFORMS=cpu .venv/bin/python -m llava_jax benchmark data --peer

page: .venv/.runtime .venv-page/.ready
	.venv-page/bin/python -m tests.show_page --model=$(MODEL)

report: .venv/.runtime .venv-page/.ready
	JAX_PLATFORMS=cpu .venv/bin/python -m tests.show_report write build/report
	.venv-page/bin/python -m tests.show_report drive build/report

load: .venv/.runtime .venv-page/.ready
	JAX_PLATFORMS=cpu .venv/bin/python -m tests.show_server --model=$(MODEL)
	.venv-page/bin/python -m tests.show_schema --model=$(MODEL)

docs: .venv/.docs
	.venv/bin/python -m sphinx -q -W --keep-going docs docs/_build/html
	@echo "open docs/_build/html/index.html"

package: .venv/.dev
	.venv/bin/python -m tests.installed

lint: .venv/.dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/lint-imports --no-logo
	$(MAKE) types

types: .venv/.dev
	.venv/bin/ty check --python .venv

# $(call environment,FOLDER): an empty virtual environment. Pip of the base Python fills it, so a Python without
# ensurepip (Debian without python3-venv) will do.
define environment
	@test -n "$(PYTHON)" && $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "error: Python 3.11 or later is needed and '$(PYTHON)' is not; install it or give it: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@$(PYTHON) -m pip --version >/dev/null 2>&1 || { \
		echo "error: $(PYTHON) has no pip; install it (for example python3-pip) and run make again" >&2; exit 2; }
	@$(1)/bin/python -c 'import sys; sys.exit("%d.%d" % sys.version_info[:2] != "$(VERSION)")' 2>/dev/null || { \
		echo "setting up $(1) with $$($(PYTHON) --version)"; \
		$(PYTHON) -m venv --clear $(1) >/dev/null 2>&1 || $(PYTHON) -m venv --clear --without-pip $(1); }
endef

# An environment is of one Python; the targets that fill it follow it, and are made again when it was.
%/.python-$(VERSION):
	$(call environment,$*)
	@touch $@

# $(call install,FOLDER,WHAT)
install = $(PYTHON) -m pip --python $(1)/bin/python install -qq --disable-pip-version-check $(2)

.venv/.runtime: requirements.txt pyproject.toml .venv/.python-$(VERSION)
	@echo "installing requirements.txt into .venv (a few minutes the first time)"
	@$(call install,.venv,-r requirements.txt)
	@$(call install,.venv,--no-deps -e .)
	@touch $@

.venv/.dev: .venv/.runtime requirements-dev.txt
	@$(call install,.venv,-r requirements-dev.txt)
	@touch $@

.venv/.docs: .venv/.runtime requirements-docs.txt
	@$(call install,.venv,-r requirements-docs.txt)
	@touch $@

.venv-parity/.parity: requirements.txt requirements-dev.txt requirements-parity.txt pyproject.toml \
		.venv-parity/.python-$(VERSION)
	@echo "installing requirements-parity.txt into .venv-parity (torch: several minutes the first time)"
	@$(call install,.venv-parity,-r requirements-dev.txt -r requirements-parity.txt)
	@$(call install,.venv-parity,--no-deps -e .)
	@touch $@

.venv-parity-446/.parity: requirements-parity-446.txt .venv-parity-446/.python-$(VERSION)
	@echo "installing requirements-parity-446.txt into .venv-parity-446 (torch: several minutes the first time)"
	@$(call install,.venv-parity-446,-r requirements-parity-446.txt)
	@touch $@

.venv-page/.ready: requirements-page.txt .venv-page/.python-$(VERSION)
	@$(call install,.venv-page,-r requirements-page.txt)
	@touch $@

$(FOREIGN): .venv-ecosystem-%/.ready: tests/ecosystem/requirements-%.txt .venv-ecosystem-%/.python-$(VERSION)
	@echo "installing tests/ecosystem/requirements-$*.txt (torch: several minutes the first time)"
	@$(call install,.venv-ecosystem-$*,-r tests/ecosystem/requirements-$*.txt)
	@touch $@

.venv-ecosystem-vllm/.ready: tests/ecosystem/requirements-vllm.txt .venv-ecosystem-vllm/.python-$(VERSION)
	@echo "installing tests/ecosystem/requirements-vllm.txt (torch with CUDA's libraries, 6 GB: several minutes)"
	@$(call install,.venv-ecosystem-vllm,--no-deps -r tests/ecosystem/requirements-vllm.txt)
	@touch $@

# The wheel has no converters, so the source stays.
.venv-ecosystem-llama-cpp/.ready: tests/ecosystem/requirements-llama-cpp.txt \
		.venv-ecosystem-llama-cpp/.python-$(VERSION)
	@echo "building tests/ecosystem/requirements-llama-cpp.txt (ten minutes on one core)"
	@rm -rf $(@D)/source $(@D)/download
	@$(PYTHON) -m pip download -qq --no-deps -c $< -d $(@D)/download llama-cpp-python
	@mkdir $(@D)/source
	@tar -xzf $(@D)/download/*.tar.gz -C $(@D)/source --strip-components=1
	@CMAKE_ARGS="-DLLAMA_OPENSSL=OFF -DMTMD_VIDEO=OFF -DGGML_CPU_REPACK=OFF -DGGML_LLAMAFILE=OFF" \
		CMAKE_BUILD_PARALLEL_LEVEL=1 $(call install,$(@D),-r $<)
	@touch $@
