"""What a rehearsal has found, as text."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

from metro_megatron.plan.layouts import Estimate
from metro_megatron.plan.report import table
from metro_megatron.rehearsal.ranks import Ranks
from metro_megatron.rehearsal.recording import Call, calls
from metro_megatron.rehearsal.timeline import BUBBLE, COMMUNICATING, WAITING, Play
from metro_megatron.rehearsal.tracing import Held, Trace

Traces = Mapping[int, Trace]
"""By traced rank."""
STATES = ("weights", "gradients", "optimizer")
"""What a home allocates, by the names of tracing.States."""


def parameters(traces: Traces, ranks: Ranks) -> list[str]:
    """By home and component: all there are, and on a rank of each kind of stage."""
    whole: Counter[tuple[str, str]] = Counter()
    for stage in range(ranks.pipeline):
        for one in traces[_first(ranks, stage)].held:
            # What is in the shared home is the same on every stage.
            if one.home == "stage" or stage == 0:
                whole[one.home, one.component] += one.whole
    kinds = _kinds_of_stages(traces, ranks)
    own = [{(one.home, one.component): one.parameters for one in trace.held} for trace in kinds.values()]
    rows = [
        [component, home, f"{total:,}", *(f"{held.get((home, component), 0):,}" for held in own)]
        for (home, component), total in whole.items()
    ]
    rows.append(["all", "", f"{sum(whole.values()):,}", *(f"{sum(held.values()):,}" for held in own)])
    return table(["parameters", "home", "whole", *(f"on {stages}" for stages in kinds)], rows)


def memory(traces: Traces, ranks: Ranks, own: Estimate) -> list[str]:
    """GB that ranks of each kind of stage allocate, and what the plan reckons with beside them.

    Components have parts of what their home allocates, padding too, as their parameters are of its.
    """
    rows = []
    for stages, trace in _kinds_of_stages(traces, ranks).items():
        for home, states in trace.states.items():
            held = {one.component: one.parameters for one in trace.held if one.home == home}
            for component, count in held.items():
                share = count / sum(held.values()) / 1e9
                sizes = [share * size for size in (states.weights, states.gradients, states.optimizer)]
                rows.append([stages, component, home, *(f"{size:,.3f}" for size in (*sizes, sum(sizes)))])
        sums = [sum(getattr(one, name) for one in trace.states.values()) for name in STATES]
        rows.append([stages, "all", "", *(f"{size / 1e9:,.3f}" for size in (*sums, sum(sums)))])
    planned = own.memory
    return [
        *table(["GB a rank", "component", "home", *STATES, "sum"], rows),
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


def _kinds_of_stages(traces: Traces, ranks: Ranks) -> dict[str, Trace]:
    """The first rank of stages that hold different things, by the stages that hold the same."""
    alike: dict[tuple[Held, ...], list[int]] = defaultdict(list)
    for stage in range(ranks.pipeline):
        alike[tuple(traces[_first(ranks, stage)].held)].append(stage)
    return {_named(stages): traces[_first(ranks, stages[0])] for stages in alike.values()}


def _named(stages: Sequence[int]) -> str:
    """Ascending numbers, those in a row by the first and the last."""
    rows: list[list[int]] = []
    for stage in stages:
        if rows and rows[-1][-1] == stage - 1:
            rows[-1][1:] = [stage]
        else:
            rows.append([stage])
    return f"stage{'s' if len(stages) > 1 else ''} {', '.join('-'.join(map(str, row)) for row in rows)}"


def _first(ranks: Ranks, stage: int) -> int:
    """The first rank of a stage."""
    return ranks.tensor * ranks.data * stage
