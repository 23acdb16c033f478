# The demo, stage by stage: `make demo` and `make learn` call this file.
#   PRESET  demo: minutes of two cores; learn: about ten minutes of one GPU, or a night of all cores
#   OUTPUT  folder of all results
# A stage runs again where its inputs are newer than what it made, and all do where this file is newer. An interrupted
# one goes on where it was, as far as its tool saves that.
PRESET := demo
OUTPUT := runs/$(PRESET)
CONFIG := examples/$(PRESET).yaml
SEEDS := 1 2 3
BIN := .venv/bin

# LEFT: the usual minutes from the beginning of each stage to the end of the last.
ifeq ($(PRESET),demo)
  PROCESSES := 2
  FINETUNING := --epochs 2 --learning_rate 5e-4
  LEFT := 13 13 13 12 5 5 4 0
else
  COUNT := import os, torch; print(torch.cuda.device_count(), len(os.sched_getaffinity(0)))
  GPUS_AND_CORES := $(shell $(BIN)/python -c "$(COUNT)")
  FINETUNING := --epochs 4 --learning_rate 2e-4
  ifeq ($(firstword $(GPUS_AND_CORES)),0)
    PROCESSES := $(lastword $(GPUS_AND_CORES))
    # Short rows, so that there are enough of them for every core.
    PRETRAINING := --data.micro_batch_tokens 1024
    LEFT := 543 543 543 542 62 62 61 0
  else
    PROCESSES := 1
    LEFT := 14 14 13 13 3 3 2 0
  endif
endif

# Says where the demo is, and notes the time for the summary: $(call begin,number of the stage,what it does).
STAGES := texts tokenizer shards pretraining export evaluation finetuning summary
begin = @mkdir -p $(OUTPUT); echo "$$(date +%s) $(word $(1),$(STAGES)) $@" >>$(OUTPUT)/begun.txt; \
	echo; echo "[$(1)/$(words $(STAGES))] $(2) | about $(word $(1),$(LEFT)) of $(firstword $(LEFT)) minutes left"

# What each stage writes last.
text := $(OUTPUT)/text/counts.json
tokenizer := $(OUTPUT)/tokenizer/report.json
shards := $(OUTPUT)/shards/held_out.manifest.json
model := $(OUTPUT)/model/config.json
starts := $(foreach seed,$(SEEDS),pretrained-$(seed) random-$(seed))
classifiers := $(starts:%=$(OUTPUT)/finetuning/%/metrics.json)

.DEFAULT_GOAL := summary
.PHONY: summary
.DELETE_ON_ERROR:
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
export PYTHONUNBUFFERED := 1
export OMP_NUM_THREADS := 1
# Two evaluations or fine-tunings share the cores of pretraining.
half := env OMP_NUM_THREADS=$(shell expr \( $(PROCESSES) + 1 \) / 2)

$(text): tools/demo/demo.mk tools/demo/texts.py metro_megatron/__init__.py
	$(call begin,1,text of the reviews and sentences)
	$(BIN)/python -m tools.demo.texts --output $(@D)

$(tokenizer): $(text) $(CONFIG)
	$(call begin,2,tokenizer)
	$(BIN)/python tools/train_tokenizer.py --input $(OUTPUT)/text/reviews.jsonl --output $(@D) \
		--vocab_size $(shell sed -n 's/^ *vocab_size: *//p' $(CONFIG)) --overwrite

$(shards): $(tokenizer)
	$(call begin,3,shards of token ids)
	$(BIN)/python tools/preprocess_data.py --input $(OUTPUT)/text/reviews.jsonl --tokenizer $(<D) \
		--output_prefix $(OUTPUT)/shards/reviews --workers 2 --overwrite
	$(BIN)/python tools/preprocess_data.py --input $(OUTPUT)/text/held_out.jsonl --tokenizer $(<D) \
		--output_prefix $(OUTPUT)/shards/held_out --workers 2 --overwrite
	@touch $@

# Other shards or another configuration need a new run. An old one is continued.
$(OUTPUT)/pretraining.begun: $(shards) $(CONFIG)
	rm -rf $(OUTPUT)/pretraining
	@touch $@

# Its processes save at SIGTERM. Ctrl-C becomes that if torchrun does not handle SIGINT, which it would pass on.
$(OUTPUT)/pretraining.done: $(OUTPUT)/pretraining.begun
	$(call begin,4,pretraining)
	$(BIN)/torchrun --standalone --nproc-per-node $(PROCESSES) --shutdown-timeout 100 \
		--signals-to-handle SIGTERM,SIGHUP pretrain_metro.py --config $(CONFIG) \
		--data.train $(OUTPUT)/shards/reviews --data.validation $(OUTPUT)/shards/held_out \
		--train.output $(OUTPUT)/pretraining $(PRETRAINING)
	@touch $@

$(model): $(OUTPUT)/pretraining.done
	$(call begin,5,Hugging Face model)
	$(BIN)/python tools/convert_checkpoint.py --load $(OUTPUT)/pretraining --output $(@D)
	@touch $@

$(OUTPUT)/evaluation.json: $(model)
	$(call begin,6,evaluation on held-out reviews)
	$(half) $(BIN)/python tools/evaluate.py --model $(<D) --input $(OUTPUT)/text/held_out.jsonl \
		--unigram_from $(OUTPUT)/shards/reviews --output $@

$(classifiers): $(OUTPUT)/finetuning/%/metrics.json: $(model)
	$(call begin,7,fine-tuning $*)
	$(half) $(BIN)/python tools/finetune.py --model $(<D) --task classification \
		--train_file $(OUTPUT)/text/train.csv --validation_file $(OUTPUT)/text/test.csv --output $(@D) $(FINETUNING) \
		--seed $(lastword $(subst -, ,$*)) $(if $(filter random-%,$*),--from_scratch)

$(OUTPUT)/baseline.json: $(text) | $(model)
	$(call begin,7,TF-IDF and logistic regression to compare with)
	$(BIN)/python -m tools.demo.baseline --train_file $(OUTPUT)/text/train.csv --test_file $(OUTPUT)/text/test.csv \
		--output $@

$(OUTPUT)/curves.png: $(OUTPUT)/pretraining.done
	$(BIN)/python tools/plot_run.py --run $(OUTPUT)/pretraining --output $@

summary: $(OUTPUT)/evaluation.json $(classifiers) $(OUTPUT)/baseline.json $(OUTPUT)/curves.png
	$(call begin,8,summary)
	$(BIN)/python -m tools.demo.summary --root $(OUTPUT)
