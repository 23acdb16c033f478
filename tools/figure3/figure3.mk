# METRO Figure 3 in miniature, stage by stage: `make figure3` calls this file. A finished arm is not trained again, an
# interrupted one goes on at its last checkpoint; another text, or another configuration of an arm, begins it anew.
OUTPUT := runs/figure3
CONFIG := examples/figure3/miniature.yaml
BIN := .venv/bin

ARMS := lr_1e-4_clip_2 lr_2e-5_clip_2 lr_1e-4_clip_1 lr_1e-4_clip_1_scaled_init
# An arm's file says clipping and initialization. Its learning rate is XL's; here it is 20 times as high.
rate = $(if $(filter lr_2e-5_%,$*),4e-4,2e-3)

text := $(OUTPUT)/text.jsonl
tokenizer := $(OUTPUT)/tokenizer/report.json
shards := $(OUTPUT)/shards/text.manifest.json

.DEFAULT_GOAL := $(OUTPUT)/figure3.png
.DELETE_ON_ERROR:
.SECONDARY:
export OMP_NUM_THREADS := 1
export PYTHONUNBUFFERED := 1

$(text): tools/figure3/texts.py
	$(BIN)/python -m tools.figure3.texts --output $@

$(tokenizer): $(text) $(CONFIG)
	$(BIN)/python tools/train_tokenizer.py --input $< --output $(@D) \
		--vocab_size $(shell sed -n 's/^ *vocab_size: *//p' $(CONFIG)) --overwrite

$(shards): $(tokenizer)
	$(BIN)/python tools/preprocess_data.py --input $(text) --tokenizer $(<D) \
		--output_prefix $(OUTPUT)/shards/text --workers 1 --overwrite
	@touch $@

$(OUTPUT)/%.begun: $(shards) $(CONFIG) examples/figure3/%.yaml tools/figure3/figure3.mk
	rm -rf $(OUTPUT)/$*
	@touch $@

$(OUTPUT)/%.done: $(OUTPUT)/%.begun
	$(BIN)/python pretrain_metro.py --config $(CONFIG) examples/figure3/$*.yaml --optimizer.lr $(rate) \
		--data.train $(OUTPUT)/shards/text --train.output $(OUTPUT)/$*
	@touch $@

$(OUTPUT)/figure3.png: $(ARMS:%=$(OUTPUT)/%.done) tools/figure3/picture.py
	$(BIN)/python -m tools.figure3.picture --root $(OUTPUT)
