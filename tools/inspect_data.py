"""Look into datasets: statistics, documents, samples and batches as text, and whether every byte is as it should."""

from metro_megatron.commands.inspect_data import run

if __name__ == "__main__":
    run()
