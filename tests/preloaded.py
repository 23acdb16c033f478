"""What is loaded once, in the server that `tests.distributed` forks processes from, instead of in each of them."""

import gc
import queue

import pytest  # noqa: F401  test modules import it
from megatron.core.dist_checkpointing.strategies import filesystem_async

import metro_megatron.train.launch  # noqa: F401
import tests.parity.small_run  # noqa: F401

# megatron-core's writer of checkpoints hands over its results in a queue of one more process, for writers that run
# beside the training. Ours is waited for: a queue in the process does. test_pretrain_metro starts the real one.
filesystem_async._results_queue = queue.Queue()

# megatron-core calls the collector around every checkpoint: what is here already is no garbage.
gc.freeze()
