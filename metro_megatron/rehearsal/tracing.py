"""One step of a rank that is not there: the program's own, on tensors without values, in groups without other members.

Everything runs as it does in training: models, wrappers, schedules, buffers, reductions, the update. Tensors are on
torch's device "meta", which knows shapes and types. Replaced are random states and the few places that ask what a
device is; what looks at values has no need to be, as nothing does on a GPU (tests/train/test_waits.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.tensor_parallel import random as mcore_random
from torch import Tensor
from torch.optim import adam
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from metro_megatron.checkpoint.sharded_state import sharded_state
from metro_megatron.checkpoint.writing import Planner
from metro_megatron.config.schema import Config
from metro_megatron.data.batch import StepBatch
from metro_megatron.health import shards
from metro_megatron.health.shards import WeightNorms
from metro_megatron.model.encoder import TIED, Pair
from metro_megatron.model.init import global_parameters, split_dimension
from metro_megatron.parallel import cpu
from metro_megatron.parallel.homes import Homes
from metro_megatron.parallel.layout import Layout
from metro_megatron.parallel.optim import Optimizer
from metro_megatron.rehearsal.recording import Event, Recorder
from metro_megatron.train.build import Parts, refuse_mixed_libraries
from metro_megatron.train.metrics import MetricSums
from metro_megatron.train.saves import Saves
from metro_megatron.train.step import Step
from metro_megatron.train.trainer import Trainer


@dataclass(frozen=True)
class Held:
    """What a rank holds of a component, in one home."""

    home: str
    component: str
    parameters: int
    whole: int
    """With what tensor-parallel ranks beside it hold."""


@dataclass(frozen=True)
class States:
    """Bytes that a rank allocates for one home."""

    weights: int
    gradients: int
    optimizer: int
    """Masters and moments."""


@dataclass(frozen=True)
class Trace:
    """What one rank does in steps, and what it holds."""

    rank: int
    around: Mapping[str, list[Event]]
    """By what is before and behind them: start, evaluation, save."""
    steps: list[list[Event]]
    held: list[Held]
    states: Mapping[str, States]
    """By home."""
    micro_batches: int
    """Of the last step, as what follows."""
    places: int
    """For tokens, in all its rows."""
    real_tokens: int
    """Of all ranks."""

    def part(self, name: str) -> list[Event]:
        """What is done in `start`, `step 1`, `step 2`, `evaluation` or `save`."""
        kind, _, number = name.partition(" ")
        return self.steps[int(number) - 1] if kind == "step" else self.around[name]


class MarkedHomes(Homes):
    """Homes that note where the parts of a step begin, and what has been waited for there."""

    recorder: Recorder

    def begin_step(self) -> None:
        self.recorder.mark("gather", 0)
        super().begin_step()
        self.recorder.mark("corrupt", _gathers(self.shared.values()))

    def end_corruption_phase(self) -> None:
        super().end_corruption_phase()
        self.recorder.mark("main", _gathers(self.all))

    def end_main_phase(self) -> None:
        self.recorder.mark("reduce", _gathers(self.all))
        super().end_main_phase()
        self.recorder.mark("update", None)


def _gathers(ddps: Iterable[DistributedDataParallel]) -> int:
    """How many calls gather their parameters: all of a step's come first."""
    return sum(len(group.buckets) for ddp in ddps for group in ddp.bucket_groups)


DEVICE = torch.device("meta")


class _WithoutValues(TorchDispatchMode):
    """Inside the block every tensor is made on "meta", whatever device is asked for.

    torch's FakeTensorMode does the same for code that must not notice, at three times the cost of a step.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.lift_fresh.default:  # torch.tensor's, of numbers
            made = args[0].to(DEVICE)
            if made.numel() == 1:
                made.number = torch.ops.aten._local_scalar_dense.default(args[0])
            return made
        if _takes_device(func):
            kwargs = {**(kwargs or {}), "device": DEVICE}
        return func(*args, **(kwargs or {}))


@cache
def _takes_device(operator: Any) -> bool:
    return any(one.name == "device" for one in operator._schema.arguments)


class _Run(Trainer):
    """A run of parts that are there, without a corpus and a folder."""

    def __init__(self, config: Config, layout: Layout, parts: Parts, homes: Homes, evaluation: Sequence[StepBatch]):
        self.config, self.layout, self.parts, self.pair, self.homes = config, layout, parts, parts.pair, homes
        self.optimizer = Optimizer(config, homes)
        self.step = Step(config, layout, parts, homes, self.optimizer)
        self.saves = Saves(None, config.checkpoint)  # type: ignore[arg-type]  # nothing is written
        self.corpus = _Nothing(evaluation)  # type: ignore[assignment]
        self.stop = _Nothing(())  # type: ignore[assignment]
        self.watchdog = self.report = None
        self._begin()


class _Nothing:
    """What a run asks of its corpus, and of whoever may stop it."""

    fingerprint = index_fingerprint = filled_by = ""
    is_asked = is_agreed = False

    def __init__(self, evaluation: Sequence[StepBatch]):
        self.evaluation = evaluation

    def evaluation_batches(self, layout: Layout) -> Sequence[StepBatch]:
        return self.evaluation

    def samples_before(self, *place: object) -> str:
        return ""


def begin(trainer: Trainer) -> None:
    """Of a run's start, what its parts gather before the first step."""
    WeightNorms(trainer.pair, trainer.optimizer, trainer.layout)


def save(trainer: Trainer) -> None:
    """Of a save, all until ranks know who could write what."""
    trainer._state()
    Planner(trainer.layout.world).gather(sharded_state(trainer.pair, trainer.optimizer, trainer.layout))


def trace(
    config: Config, world_size: int, rank: int, batches: Sequence[StepBatch], evaluation: Sequence[StepBatch]
) -> Trace:
    """Trace the steps that read these batches as `rank` of world_size does them, and what is around them.

    In a process that has joined no others. Nothing is dropped: masks are hundreds of small operations, and call nobody.
    Layers and Adam are those that need no GPU.
    """
    config = replace(
        config,
        model=replace(config.model, hidden_dropout=0.0, attention_dropout=0.0),
        parallel=replace(config.parallel, transformer_impl="local"),
        optimizer=replace(config.optimizer, adam_impl="torch"),
        train=replace(config.train, fp8_recipe="none"),
    )
    recorder = Recorder()
    with ExitStack() as stack:
        stack.enter_context(patch.dict(dist.Backend.backend_capability, fake=[DEVICE.type]))
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        stack.callback(dist.destroy_process_group)
        stack.enter_context(_without_values())
        layout = replace(Layout.create(config.parallel, torch.device("cpu")), device=DEVICE)
        stack.callback(layout.destroy)
        stack.enter_context(recorder.objects())
        with recorder, _reading_zeros():
            refuse_mixed_libraries(config, layout)
            parts = Parts.build(config, layout)
            homes = MarkedHomes.build(config, layout, parts.pair.shared, parts.pair.main, both_phases=TIED)
            object.__setattr__(homes, "recorder", recorder)
            run = _Run(config, layout, parts, homes, evaluation)
            begin(run)
        around, steps = {"start": recorder.taken()}, []
        for batch in batches:
            with recorder, recorder.arrivals():
                run.step.train(batch, MetricSums(layout, parts.all_terms))
            steps.append(recorder.taken())
        for part, does in (("evaluation", run.evaluate), ("save", partial(save, run))):
            with recorder, recorder.arrivals(), _reading_zeros():
                does()
            around[part] = recorder.taken()
        return Trace(
            rank=rank,
            around=around,
            steps=steps,
            held=_held(parts.pair, layout),
            states=states_of(homes, run.optimizer),
            micro_batches=len(batch.micro_batches),
            places=sum(one.tokens.numel() for one in batch.micro_batches),
            real_tokens=batch.num_tokens,
        )


def _held(pair: Pair, layout: Layout) -> list[Held]:
    found: dict[tuple[str, str], list[int]] = {}
    for prefix, module in pair.modules():
        for name, parameter in global_parameters(module, prefix):
            count = parameter.numel()
            whole = count * (layout.tensor.size() if split_dimension(parameter) is not None else 1)
            sums = found.setdefault(("stage" if prefix == "main." else "shared", _component(name)), [0, 0])
            sums[0] += count
            sums[1] += whole
    return [Held(*where, *sums) for where, sums in found.items()]


def _component(name: str) -> str:
    """Of a parameter by its global name."""
    model, _, rest = name.partition(".")
    if model == TIED:
        return "embeddings"
    if model != "main":
        return "auxiliary"
    part = rest.partition(".")[0]
    return {"block": "main layers", "embedding": "embeddings"}.get(part, "heads")


def states_of(homes: Homes, optimizer: Optimizer) -> dict[str, States]:
    """What this rank has allocated, by home; moments are there from the first update on."""
    found = {}
    for name, ddps, one in (
        ("shared", homes.shared.values(), optimizer.shared),
        ("stage", homes.stage, optimizer.stage),
    ):
        buffers = [buffer for ddp in ddps for buffer in ddp.buffers]
        state = sum(
            moment.nbytes
            for moments in one.optimizer.state.values()
            for moment in moments.values()
            if moment.dim()  # all but the step
        )
        masters = [shard for group in one.shard_fp32_from_float16_groups for shard in group]
        found[name] = States(
            weights=sum(buffer.param_data.nbytes for buffer in buffers),
            gradients=sum(buffer.grad_data.nbytes for buffer in buffers),
            optimizer=state + sum(master.nbytes for master in masters),
        )
    return found


@contextmanager
def _without_values() -> Iterator[None]:
    cpu.install()  # before what it answers is patched for a while
    with ExitStack() as stack:
        for owner, name, other in (
            (dist, "all_gather_object", _as_here),
            (torch, "set_rng_state", _nothing),
            (adam, "_device_dtype_check_for_fused", _nothing),
            (Tensor, "type", _on_gpu(Tensor.type)),
            (mcore_random.CudaRNGStatesTracker, "fork", _no_fork),
            (shards, "ThreadPoolExecutor", _in_turn),
        ):
            stack.enter_context(patch.object(owner, name, other))
        stack.enter_context(_WithoutValues())
        yield


@contextmanager
def _reading_zeros() -> Iterator[None]:
    """What is read of tensors without values, outside of steps, is the number that one was made of, or 0."""
    with ExitStack() as stack:
        for name, read in (("tolist", _zeros), ("item", _number), ("__int__", _as_int), ("__float__", _as_float)):
            stack.enter_context(patch.object(Tensor, name, read))
        yield


def _in_turn(number: int) -> Any:
    """For threads, in which tensors without values cannot be."""
    return nullcontext(SimpleNamespace(map=map))


def _zeros(tensor: Tensor) -> Any:
    return 0 if tensor.dim() == 0 else [_zeros(one) for one in tensor]


def _number(tensor: Tensor) -> Any:
    return getattr(tensor, "number", 0)


def _as_int(tensor: Tensor) -> int:
    return int(_number(tensor))


def _as_float(tensor: Tensor) -> float:
    return float(_number(tensor))


def _on_gpu(type_name: Callable[..., Any]) -> Callable[..., Any]:
    """megatron-core sorts parameters by names such as torch.cuda.FloatTensor."""

    def named(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = type_name(tensor, *args, **kwargs)
        return answer.replace(".meta.", ".") if isinstance(answer, str) else answer

    return named


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


def _as_here(everyone: list[Any], own: Any, group: Any = None) -> None:
    """megatron-core asks which groups of parameters other ranks have; what they lack would be an empty group."""
    everyone[:] = [own] * len(everyone)


def _no_fork(tracker: Any, name: str = "") -> Any:
    return nullcontext()
