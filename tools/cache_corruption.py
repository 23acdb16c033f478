"""The replacements of a run with a frozen model, drawn before it: then no model but main runs in it (Fast-ELECTRA)."""

from metro_megatron.commands.cache_corruption import run

if __name__ == "__main__":
    run()
