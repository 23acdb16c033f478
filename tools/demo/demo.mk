# The demo, stage by stage: `make demo` calls this file.
#   MINUTES  on two quiet cores, from 3: how long it pretrains follows from it
#   OUTPUT   folder of all results
# A stage runs again where its inputs are newer than what it made, and all do where this file is newer. An interrupted
# one goes on where it was, as far as its tool saves that.
MINUTES := 8
OUTPUT := runs/demo
CONFIG := examples/demo.yaml
VOCAB_SIZE := 4096
SEEDS := 1 2 3
BIN := .venv/bin

ifneq ($(shell expr $(MINUTES) + 0 \>= 3 2> /dev/null),1)
  $(error MINUTES is $(MINUTES), must be a whole number, at least 3)
endif
# What is left of the minutes beside the other stages, at the pace of two quiet cores.
STEPS := $(shell expr $(MINUTES) \* 600 - 1400)
PRETRAINING := --train.train_steps $(STEPS) --optimizer.lr_warmup_steps $(shell expr $(STEPS) / 16) \
	--train.eval_interval $(shell expr $(STEPS) / 5)
IS_SHORT := $(filter 1,$(shell expr $(MINUTES) \< 6))
FINETUNING := --epochs $(if $(IS_SHORT),1,2) --learning_rate 5e-4 --batching packed
# The usual minutes from the beginning of each stage to the end of the last.
LEFT := $(MINUTES) $(MINUTES) $(MINUTES) $(MINUTES) $(if $(IS_SHORT),2 2 1 0,3 3 2 0)

# Says where the demo is, and notes the time for the summary: $(call begin,number of the stage,what it does).
STAGES := texts tokenizer shards pretraining export evaluation tasks summary
begin = @mkdir -p $(OUTPUT); echo "$$(date +%s) $(word $(1),$(STAGES)) $@" >>$(OUTPUT)/begun.txt; \
	echo; echo "[$(1)/$(words $(STAGES))] $(2) | about $(word $(1),$(LEFT)) of $(firstword $(LEFT)) minutes left"

# What each stage writes last.
text := $(OUTPUT)/text/counts.json
tokenizer := $(OUTPUT)/tokenizer/report.json
shards := $(OUTPUT)/shards/held_out.manifest.json
model := $(OUTPUT)/model/config.json
starts := $(foreach seed,$(SEEDS),pretrained-$(seed) random-$(seed))
classifiers := $(starts:%=$(OUTPUT)/acceptability/%/metrics.json)

.DEFAULT_GOAL := summary
.PHONY: summary FORCE
.DELETE_ON_ERROR:
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
export PYTHONUNBUFFERED := 1
export OMP_NUM_THREADS := 1

# Changes when another number of minutes is asked for.
$(OUTPUT)/minutes: FORCE
	@mkdir -p $(@D); echo $(MINUTES) | cmp -s - $@ || echo $(MINUTES) >$@

$(text): tools/demo/demo.mk tools/demo/texts.py metro_megatron/__init__.py
	$(call begin,1,text of the reviews and sentences)
	$(BIN)/python -m tools.demo.texts --output $(@D)

$(tokenizer): $(text) $(CONFIG)
	$(call begin,2,tokenizer)
	$(BIN)/python tools/train_tokenizer.py --input $(OUTPUT)/text/reviews.jsonl --output $(@D) \
		--vocab_size $(VOCAB_SIZE) --overwrite

$(shards): $(tokenizer)
	$(call begin,3,shards of token ids)
	$(BIN)/python tools/preprocess_data.py --input $(OUTPUT)/text/reviews.jsonl --tokenizer $(<D) \
		--output_prefix $(OUTPUT)/shards/reviews --workers 2 --overwrite
	$(BIN)/python tools/preprocess_data.py --input $(OUTPUT)/text/held_out.jsonl --tokenizer $(<D) \
		--output_prefix $(OUTPUT)/shards/held_out --workers 2 --overwrite
	@touch $@

# Other shards, minutes or another configuration need a new run. An old one is continued.
$(OUTPUT)/pretraining.begun: $(shards) $(CONFIG) $(OUTPUT)/minutes
	rm -rf $(OUTPUT)/pretraining
	@touch $@

# Its processes save at SIGTERM. Ctrl-C becomes that if torchrun does not handle SIGINT, which it would pass on.
$(OUTPUT)/pretraining.done: $(OUTPUT)/pretraining.begun
	$(call begin,4,pretraining)
	$(BIN)/torchrun --standalone --nproc-per-node 2 --shutdown-timeout 100 \
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
	$(BIN)/python tools/evaluate.py --model $(<D) --input $(OUTPUT)/text/held_out.jsonl \
		--unigram_from $(OUTPUT)/shards/reviews --sentences 6 --output $@

$(classifiers): $(OUTPUT)/acceptability/%/metrics.json: $(model)
	$(call begin,7,acceptability: fine-tuning $*)
	$(BIN)/python tools/finetune.py --model $(<D) --task classification --output $(@D) $(FINETUNING) \
		--train_file $(OUTPUT)/text/acceptability_train.csv \
		--validation_file $(OUTPUT)/text/acceptability_test.csv \
		--seed $(lastword $(subst -, ,$*)) $(if $(filter random-%,$*),--from_scratch)

$(OUTPUT)/acceptability/baseline.json: $(text) | $(model)
	$(call begin,7,acceptability: TF-IDF and logistic regression to compare with)
	$(BIN)/python -m tools.demo.baseline --output $@ \
		--train_file $(OUTPUT)/text/acceptability_train.csv --test_file $(OUTPUT)/text/acceptability_test.csv

$(OUTPUT)/sentiment.json: $(model)
	$(call begin,7,sentiment: frozen features)
	$(BIN)/python -m tools.demo.sentiment --model $(<D) --output $@ \
		--train_file $(OUTPUT)/text/sentiment_train.csv --test_file $(OUTPUT)/text/sentiment_test.csv

$(OUTPUT)/cloze.json: $(model)
	$(call begin,7,cloze: the detection head as pretrained)
	$(BIN)/python -m tools.demo.cloze --model $(<D) --output $@ \
		--train_file $(OUTPUT)/text/cloze_train.jsonl --test_file $(OUTPUT)/text/cloze_test.jsonl

$(OUTPUT)/curves.png: $(OUTPUT)/pretraining.done
	$(BIN)/python tools/plot_run.py --run $(OUTPUT)/pretraining --output $@

# In their order: the shortest last, so that neither core waits long for the other.
results := $(OUTPUT)/evaluation.json $(OUTPUT)/sentiment.json $(classifiers) $(OUTPUT)/cloze.json \
	$(OUTPUT)/acceptability/baseline.json

summary: $(results) $(OUTPUT)/curves.png
	$(call begin,8,summary)
	$(BIN)/python -m tools.demo.summary --root $(OUTPUT)
