# The campaign: `make learn` calls this file. Run it again to go on where it was.
#   BUDGET  FLOPs of each run; 2e13 takes about eight minutes of two cores
#   SEEDS   how many of METRO, ELECTRA and MLM; other arms have 3 at most
#   RATES   peak learning rates that seed 1 of each arm tries
OUTPUT := runs/campaign
BUDGET := 2e13
SEEDS := 5
RATES := 1e-3 5e-4 2e-3
BIN := .venv/bin

.DEFAULT_GOAL := campaign
.PHONY: campaign
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
export PYTHONUNBUFFERED := 1
export OMP_NUM_THREADS := 1

# Made once, by the demo's first stages: rows of other text could not be compared.
shards := $(OUTPUT)/shards/held_out.manifest.json

$(shards):
	$(MAKE) --no-print-directory -f tools/demo/demo.mk OUTPUT=$(OUTPUT) CONFIG=examples/campaign/common.yaml BIN=$(BIN) \
		STAGES="texts tokenizer shards" LEFT="2 2 1" $@

campaign: | $(shards)
	nice -n 19 $(BIN)/python -m tools.campaign.campaign --root $(OUTPUT) --budget $(BUDGET) --seeds $(SEEDS) \
		--rates $(RATES)
