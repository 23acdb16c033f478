"""Which process does what: the groups of one run, made once and passed on explicitly."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import ProcessGroup, Store

from metro_megatron.config.schema import ParallelConfig
from metro_megatron.errors import UserError
from metro_megatron.parallel import cpu

LATER = 1.1
"""Collectives wait so many times as long as ranks may be still: train/watchdog.py knows more to say than they."""

Value = TypeVar("Value")


@dataclass(frozen=True)
class Layout:
    """The groups that this rank belongs to.

    `replica` holds the ranks that replicate the shared home: same tensor-parallel rank, all data-parallel
    and pipeline ranks. `solo` is this rank alone: the answer where megatron-core wants a group and the
    model needs none.
    """

    device: torch.device
    tensor: ProcessGroup
    data: ProcessGroup
    pipeline: ProcessGroup
    model: ProcessGroup
    replica: ProcessGroup
    solo: ProcessGroup
    world: ProcessGroup
    has_joined: bool
    """Whether this layout joined the processes, and leaves them in the end."""

    @classmethod
    def create(cls, config: ParallelConfig, device: torch.device, store: Store | None = None) -> Layout:
        """Make the groups, after joining the processes if nobody has (torchrun's environment, or a lone process).

        store: as `meet` gives it, where the processes have met.
        """
        if device.type == "cpu":
            cpu.install()
        else:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
        # Under torchrun processes cannot join twice: a benchmark of several layouts has joined before.
        has_joined = not dist.is_initialized()
        timeout = timedelta(minutes=LATER * config.timeout_minutes)
        if has_joined:
            _join(device, timeout, store)
        chunks = config.virtual_pipeline_model_parallel_size
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=config.tensor_model_parallel_size,
            pipeline_model_parallel_size=config.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=chunks if config.is_interleaved else None,
            distributed_timeout_minutes=LATER * config.timeout_minutes,  # type: ignore[arg-type] # goes into a timedelta
            create_gloo_process_groups=False,
        )
        world_size, tp = dist.get_world_size(), config.tensor_model_parallel_size
        # Tensor parallelism varies fastest in megatron-core's order of ranks.
        replica = _own_group([range(first, world_size, tp) for first in range(tp)], timeout)
        # Nobody else has to know of it; in turns, each of some hundred ranks would wait for all others.
        solo = dist.new_group([dist.get_rank()], timeout, use_local_synchronization=True)
        # megatron-core wants its tracker of generators seeded; nothing of ours draws from one.
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        return cls(
            device=device,
            tensor=parallel_state.get_tensor_model_parallel_group(),
            data=parallel_state.get_data_parallel_group(),
            pipeline=parallel_state.get_pipeline_model_parallel_group(),
            model=parallel_state.get_model_parallel_group(),
            replica=replica,
            solo=solo,
            # A group of its own: barriers and figures do not wait behind what runs in the default group.
            world=dist.new_group(list(range(world_size)), timeout),
            has_joined=has_joined,
        )

    @property
    def rank(self) -> int:
        return self.world.rank()

    @cached_property
    def shared_groups(self) -> ProcessGroupCollection:
        """The shared home's, as megatron-core names them: replicated over data and pipeline ranks, in no pipeline."""
        return self._home(self.replica, self.solo, self.tensor)

    @cached_property
    def stage_groups(self) -> ProcessGroupCollection:
        """The stage home's: replicated over data-parallel ranks only."""
        return self._home(self.data, self.pipeline, self.model)

    def _home(self, data: ProcessGroup, pipeline: ProcessGroup, model: ProcessGroup) -> ProcessGroupCollection:
        groups = ProcessGroupCollection.use_mpu_process_groups()
        groups.tp, groups.pp, groups.mp, groups.tp_ep_pp = self.tensor, pipeline, model, model
        groups.dp = groups.dp_cp = groups.expt_dp = data
        groups.embd = groups.pos_embd = self.solo  # ties are inside a home: nothing to reduce between stages
        return groups

    def any_rank(self, flag: bool) -> bool:
        """Whether it is true on any rank; the same answer everywhere. A collective call that waits: not for a step."""
        flags = torch.full((1,), float(flag), device=self.device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.world)
        return bool(flags.item())

    def of_first_rank(self, find: Callable[[], Value]) -> Value:
        """What the first rank finds, on all. A collective call that waits."""
        found: list[Any] = [find() if self.rank == 0 else None]
        dist.broadcast_object_list(found, src=0, group=self.world)
        return found[0]

    def destroy(self) -> None:
        """Leave the groups; the process can create another layout afterwards."""
        parallel_state.destroy_model_parallel()
        if self.has_joined:
            dist.destroy_process_group()


def meet(minutes: float) -> Store:
    """The store in which the processes of torchrun find each other; others may come later.

    Raises UserError if it is not there within `minutes`, or if its port is another program's.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_torchruns = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_own = os.environ["RANK"] == "0" and not is_torchruns
    try:
        return dist.TCPStore(
            host,
            port,
            is_master=is_own,
            timeout=timedelta(minutes=LATER * minutes),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except RuntimeError as error:
        why = str(error).splitlines()[0]
        if is_own:
            raise UserError(
                f"rank 0 cannot listen at {host}:{port}, where all ranks meet: start again, with another --master-port "
                f"if torchrun was given one ({why})"
            ) from error
        whose = "torchrun of the first machine" if is_torchruns else "rank 0"
        raise UserError(
            f"{whose} does not answer at {host}:{port} for {minutes:g} minutes (parallel.timeout_minutes), where all "
            f"ranks meet: see whether it runs, and whether this machine reaches it ({why})"
        ) from error


def _join(device: torch.device, timeout: timedelta, store: Store | None) -> None:
    backend = "gloo" if device.type == "cpu" else "nccl"
    if store is not None:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    elif "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def _own_group(groups: list[range], timeout: timedelta) -> ProcessGroup:
    """Every rank makes every group, in one order, and keeps its own."""
    rank = dist.get_rank()
    made = [(ranks, dist.new_group(list(ranks), timeout)) for ranks in groups]
    return next(group for ranks, group in made if rank in ranks)
