"""The stages of make figure3: METRO Figure 3 with models that two cores can train."""
