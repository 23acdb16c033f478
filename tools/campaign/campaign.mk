# The campaign: `make learn` calls this file. Run it again to go on where it was.
#   BUDGET  minutes of each run, for which METRO's first steps are timed; empty: FLOPS
#   FLOPS   of each run; 2e13 is twelve minutes of a core, two cores do two in that time
#   SEEDS   how many of METRO, ELECTRA and MLM; other arms have 3 at most
#   RATES   peak learning rates that seed 1 of each arm tries
#   ARMS    those to pretrain now, all if empty: the others are left for later
#   CONFIG  configuration files of all arms: of another size are other runs
#   JOBS    runs beside each other, of PROCESSES data-parallel processes each; for one GPU JOBS=1
OUTPUT := runs/campaign
BUDGET :=
FLOPS := 2e13
SEEDS := 5
RATES := 1e-3 5e-4 2e-3
ARMS :=
BIN := .venv/bin
CONFIG := examples/campaign/common.yaml
JOBS := 2
PROCESSES := 1
RESULTS := docs/results/campaign.csv

# What each stage writes last. All are made once: rows of another text could not be compared.
tasks := $(OUTPUT)/tasks/manifest.json
text := $(OUTPUT)/text/counts.json
tokenizer := $(OUTPUT)/tokenizer/report.json
shards := $(OUTPUT)/shards/train.manifest.json $(OUTPUT)/shards/validation.manifest.json

.DEFAULT_GOAL := campaign
.PHONY: campaign
.DELETE_ON_ERROR:
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
export PYTHONUNBUFFERED := 1
export OMP_NUM_THREADS := 1
run := nice -n 19 $(BIN)/python

# Before the text, which is cleaned of them: so they are the same for every text.
$(tasks):
	$(run) tools/make_tasks.py --output $(@D)

$(text): | $(tasks)
	$(run) -m tools.campaign.texts --tasks $(OUTPUT)/tasks --output $(@D)

$(tokenizer): | $(text)
	$(run) tools/train_tokenizer.py --input $(OUTPUT)/text/train.jsonl --output $(@D) --overwrite \
		--vocab_size $(shell sed -n 's/^ *vocab_size: *//p' $(firstword $(CONFIG)))

$(OUTPUT)/shards/%.manifest.json: | $(tokenizer)
	$(run) tools/preprocess_data.py --input $(OUTPUT)/text/$*.jsonl --tokenizer $(OUTPUT)/tokenizer \
		--output_prefix $(OUTPUT)/shards/$* --workers 2

campaign: | $(shards)
	$(run) -m tools.campaign.campaign --root $(OUTPUT) --results $(RESULTS) \
		$(if $(BUDGET),--minutes $(BUDGET),--budget $(FLOPS)) --seeds $(SEEDS) --rates $(RATES) \
		$(if $(ARMS),--arms $(ARMS)) --config $(CONFIG) --processes $(PROCESSES) --jobs $(JOBS)
