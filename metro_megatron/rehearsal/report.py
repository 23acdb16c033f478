"""What a rehearsal has found, as text."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

from metro_megatron.plan.layouts import Estimate
from metro_megatron.plan.report import table
from metro_megatron.rehearsal.ranks import Ranks
from metro_megatron.rehearsal.recording import Call, calls
from metro_megatron.rehearsal.timeline import BUBBLE, COMMUNICATING, WAITING, Play
from metro_megatron.rehearsal.tracing import Trace

Traces = Mapping[int, Trace]
"""By traced rank."""


def parameters(traces: Traces, ranks: Ranks) -> list[str]:
    """By home and component: all there are, and on a rank of each kind of stage."""
    stages = _stages(ranks)
    whole: Counter[tuple[str, str]] = Counter()
    for stage in range(ranks.pipeline):
        for one in traces[_first(ranks, stage)].held:
            # What is in the shared home is the same on every stage.
            if one.home == "stage" or stage == 0:
                whole[one.home, one.component] += one.whole
    own = {
        stage: {(one.home, one.component): one.parameters for one in traces[_first(ranks, stage)].held}
        for stage in stages
    }
    rows = [
        [component, home, f"{total:,}", *(f"{own[stage].get((home, component), 0):,}" for stage in stages)]
        for (home, component), total in whole.items()
    ]
    rows.append(["all", "", f"{sum(whole.values()):,}", *(f"{sum(own[stage].values()):,}" for stage in stages)])
    return table(["parameters", "home", "whole", *(f"on stage {stage}" for stage in stages)], rows)


def memory(traces: Traces, ranks: Ranks, own: Estimate) -> list[str]:
    """GB that ranks of each kind of stage allocate, by home, and what the plan reckons with beside them."""
    rows = []
    for stage in _stages(ranks):
        for home, states in traces[_first(ranks, stage)].states.items():
            sizes = (states.weights, states.gradients, states.optimizer)
            rows.append([f"stage {stage}", home, *(f"{size / 1e9:,.3f}" for size in (*sizes, sum(sizes)))])
    planned = own.memory
    return [
        *table(["GB a rank", "home", "weights", "gradients", "optimizer", "sum"], rows),
        f"activations {planned.activations / 1e9:,.2f} and heads {planned.heads / 1e9:,.2f} on the rank that needs "
        f"most, by the plan; {own.cluster.memory_limit / 1e9:,.1f} are there",
    ]


def communication(steps: Mapping[int, Sequence[Call]], ranks: Ranks) -> list[str]:
    """Calls of a step by kind of group: of the rank with most bytes, how many and how much."""
    most: dict[tuple[str, str], tuple[int, int]] = {}
    for of_rank in steps.values():
        sums: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
        for call in of_rank:
            entry = sums[ranks.kind_of(call.group) or "", call.operation]
            entry[0] += call.bytes
            entry[1] += 1
        for key, (size, count) in sums.items():
            most[key] = max(most.get(key, (0, 0)), (size, count))
    rows = []
    for kind, groups in ranks.groups.items():
        for (own, operation), (size, count) in sorted(most.items()):
            if own == kind:
                rows.append(
                    [kind, f"{len(groups):,} x {len(groups[0]):,}", operation, f"{count:,}", f"{size / 1e6:,.3f}"]
                )
    return table(["a step's calls", "groups x ranks", "operation", "calls a rank", "MB a rank"], rows)


def time(play: Play, own: Estimate, traces: Traces, ranks: Ranks) -> Iterator[str]:
    """The step, and where its time goes."""
    one = traces[0]
    places = sum(traces[ranks.stand_in(rank)].places for rank in range(ranks.tensor * ranks.data)) // ranks.tensor
    yield (
        f"{one.micro_batches:,} micro batches a rank; {one.real_tokens:,} of {places:,} places hold tokens "
        f"({one.real_tokens / places:.0%})"
    )
    yield (
        f"a step takes {1e3 * play.seconds:,.2f} ms as played, {1e3 * own.seconds.total:,.2f} by the plan: "
        f"{one.real_tokens / play.seconds:,.0f} tokens/s"
    )
    yield (
        f"of it pipeline bubble {play.share(BUBBLE):.1%}, waiting for parameters, gradients and others "
        f"{play.share(WAITING):.1%}, communicating with nothing beside it {play.share(COMMUNICATING):.1%}"
    )


def second_steps(traces: Traces) -> dict[int, list[Call]]:
    return {rank: calls(trace.steps[1]) for rank, trace in traces.items()}


def _stages(ranks: Ranks) -> list[int]:
    """The first, one of the middle, the last."""
    return sorted({0, ranks.pipeline // 2, ranks.pipeline - 1})


def _first(ranks: Ranks, stage: int) -> int:
    """The first rank of a stage."""
    return ranks.tensor * ranks.data * stage
