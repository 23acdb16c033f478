"""The rehearsal of a run: traces, what they show, and what is said of it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from metro_megatron.config.schema import Config
from metro_megatron.plan.layouts import Cluster, estimate
from metro_megatron.rehearsal import report
from metro_megatron.rehearsal.documents import STEPS, Documents
from metro_megatron.rehearsal.matching import mismatches
from metro_megatron.rehearsal.picture import draw
from metro_megatron.rehearsal.ranks import Ranks
from metro_megatron.rehearsal.recording import Event, calls
from metro_megatron.rehearsal.timeline import Play, Speeds
from metro_megatron.rehearsal.tracing import Trace, trace


@dataclass(frozen=True)
class Rehearsal:
    """What is known of a run before it."""

    config: Config
    cluster: Cluster
    ranks: Ranks
    traces: Mapping[int, Trace]

    @classmethod
    def of(cls, documents: Documents, cluster: Cluster, processes: int, on_rank: Callable[[int], object]) -> Rehearsal:
        """Trace one rank of each class, in so many processes; on_rank hears of each that is done."""
        config = documents.config
        ranks = Ranks.of(config.parallel, cluster.gpus)
        read = {
            place: (documents.batches(place, ranks.data), documents.evaluation(place, ranks.data))
            for place in {0, ranks.data - 1}
        }
        own = [read[ranks.places[rank].data] for rank in ranks.traced]
        traces = {}
        torch.set_num_threads(1)  # what has started threads must not be forked
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(min(processes, len(ranks.traced)), context) as pool:
            for made in pool.map(partial(trace, config, cluster.gpus), ranks.traced, *zip(*own, strict=True)):
                traces[made.rank] = made
                on_rank(made.rank)
        return cls(config, cluster, ranks, traces)

    def faults(self) -> list[str]:
        """Why ranks would wait for each other for ever; none where they do not."""
        steps = [f"step {number + 1}" for number in range(STEPS)]
        for part in ("start", *steps, "evaluation", "save"):
            events = {rank: one.part(part) for rank, one in self.traces.items()}
            found = mismatches({rank: calls(own) for rank, own in events.items()}, self.ranks)
            if not found:
                found = [f"rank {rank} waits for {what}" for rank, what in self._play(events).run().items()]
            if found:
                return [f"{part}: {one}" for one in found]
        return []

    def sections(self, picture: Path | None) -> Iterator[list[str]]:
        """What the report says, where there are no faults."""
        own = estimate(self.config, self.cluster)
        play = self._play({rank: one.steps[1] for rank, one in self.traces.items()})
        play.run()
        yield report.parameters(self.traces, self.ranks)
        yield report.memory(self.traces, self.ranks, own)
        yield report.communication(report.second_steps(self.traces), self.ranks)
        yield list(report.time(play, own, self.traces, self.ranks))
        if picture:
            title = f"a step of {self.cluster.gpus:,} ranks: {1e3 * play.seconds:,.2f} ms, by a simple model"
            draw(play.spans, self.ranks, title, picture)

    def _play(self, events: Mapping[int, Sequence[Event]]) -> Play:
        own = estimate(self.config, self.cluster)
        flops = 1e12 * self.cluster.efficiency * self.cluster.gpu.peak(self.config.train.precision)
        speeds = Speeds(flops, self.cluster, self.config.parallel.overlap, own.seconds.optimizer)
        return Play(events, self.ranks, speeds)
