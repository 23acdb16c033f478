"""What is loaded once, in the server that `tests.distributed` forks processes from, instead of in each of them."""

import gc

import pytest  # noqa: F401  test modules import it

import metro_megatron.train.launch  # noqa: F401
import tests.parity.small_run  # noqa: F401

# megatron-core calls the collector around every checkpoint: what is here already is no garbage.
gc.freeze()
