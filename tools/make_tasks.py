"""Make tasks that judge an encoder of dictionaries, manuals and reviews."""

from metro_megatron.commands.make_tasks import run

if __name__ == "__main__":
    run()
