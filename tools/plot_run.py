"""Draw the curves of one or several runs."""

from metro_megatron.commands.plot_run import run

if __name__ == "__main__":
    run()
