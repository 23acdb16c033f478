"""Alarms as functions of figures: each goes off at its mark and not before, and is said once."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import entropy

from metro_megatron.config.phases import Phase
from metro_megatron.config.schema import Config, EarlyExitConfig, OptimizerConfig, TrainConfig
from metro_megatron.data.loader import PretrainingData
from metro_megatron.health import watch as watch_module
from metro_megatron.health.alarms import ALARMS
from metro_megatron.health.history import History, Line, Masks
from metro_megatron.health.trivial import WordFrequencies, detection_entropy
from metro_megatron.health.watch import QUIET_LINES, Watch, masks_of, sample_hashes
from metro_megatron.parallel.optim import Update
from tests.parity.small_run import memory_shard, small_config, small_corpus

CONFIG = Config(
    optimizer=OptimizerConfig(lr=5e-4, lr_warmup_steps=100, lr_decay_steps=0),
    train=TrainConfig(train_steps=1000, precision="bf16"),
)
RATES = CONFIG.optimizer.learning_rate(1000)
FIGURES = {
    "aux_loss": 5.0,
    "aux_accuracy": 0.2,
    "sampled_accuracy": 0.08,
    "clm_loss": 5.2,
    "rtd_loss": 0.38,
    "rtd_auc": 0.65,
    "replace_accuracy": 0.1,
    "replace_rate": 0.138,
    "learning_rate": 5e-4,
    "loss_scale": 1.0,
    "shared_grad_norm": 0.7,
    "stage_grad_norm": 0.7,
}
MATRIX = "main.block.layers.0.mlp.linear_fc1.weight"


STILL = {"weights": {MATRIX: (20.0, 10**6)}}


def line(step: int, **changed: Any) -> Line:
    """One of ten steps in the middle of a healthy run; what is no field of a line is a figure."""
    fields = {name: changed.pop(name) for name in list(changed) if name in Line.__dataclass_fields__}
    healthy = Line(
        step=step,
        figures={**FIGURES, "learning_rate": RATES.at(step - 1, 1000), **changed},
        masked=15_000,
        tokens=100_000,
        norms=(1.0,) * 10,
        unigram=6.8,
        weights={MATRIX: (20.0 + step / 1e3, 10**6)},
    )
    return replace(healthy, **fields)


def said(lines: list[Line], config: Config = CONFIG) -> set[str]:
    return {alarm.name for alarm in ALARMS if alarm.sees(History(config, lines))}


def after(**changed: Any) -> list[Line]:
    """Lines up to step 600 of 1000, the last two windows as told."""
    return [line(step, **(changed if step > 560 else {})) for step in range(10, 610, 10)]


def always(**changed: Any) -> list[Line]:
    return [line(step, **changed) for step in range(10, 610, 10)]


NEVER_BETTER = ("worse than frequencies", "RTD says original to all", "stuck on word frequencies")


def test_a_healthy_run_has_none_from_its_first_line() -> None:
    lines = after()
    for count in range(1, len(lines)):
        assert said(lines[:count]) == set()


@pytest.mark.parametrize(
    ("name", "sick", "nearly"),
    [
        ("gradients not finite", {"skipped": 1}, {}),
        ("no gradient", {"stage_grad_norm": 0.0}, {"stage_grad_norm": 1e-9}),
        # (1 - 0.9) of weights of 0.02
        ("learning rate too high", {"learning_rate": 2.1e-3}, {"learning_rate": 2.0e-3}),
        # One gradient of norm 1 in 10^13 elements has an element of 3e-7, below 1e-6.
        ("epsilon rules Adam", {"weights": {"a": (1.0, 10**13)}}, {"weights": {"a": (1.0, 10**11)}}),
        ("repeated data", {"repeated": 0.51}, {"repeated": 0.5}),
        ("weights do not move", STILL, {}),
        # 5% of 5e-4
        ("weights do not move", STILL | {"learning_rate": 2.6e-5}, STILL | {"learning_rate": 2.4e-5}),
        ("worse than frequencies", {"clm_loss": 6.95}, {"clm_loss": 6.85}),
        ("detection inverted", {"rtd_auc": 0.44}, {"rtd_auc": 0.46}),
        ("RTD says original to all", {"rtd_auc": 0.505, "rtd_loss": 0.4}, {"rtd_auc": 0.52}),
        (
            "RTD says original to all",
            {"rtd_auc": 0.505, "rtd_loss": 0.5, "replace_accuracy": 0.1},
            {"rtd_auc": 0.505, "rtd_loss": 0.5, "replace_accuracy": 0.11},
        ),
        # 2 AUC - 1, 2 times five standard deviations of 0.0019, and 2%, below the entropy of 0.138, which is 0.4013
        ("RTD learns other labels", {"rtd_auc": 0.5, "rtd_loss": 0.385}, {"rtd_auc": 0.5, "rtd_loss": 0.387}),
        ("RTD learns other labels", {"rtd_auc": 0.55, "rtd_loss": 0.345}, {"rtd_auc": 0.55, "rtd_loss": 0.347}),
        ("repeated data", {"again": 1e-3}, {}),
        # 15,000 (1 - 0.08) of 100,000
        ("replacements not as drawn", {"replace_rate": 0.13801}, {"replace_rate": 0.138004}),
        ("learning rate not planned", {"rates": (5e-4,) * 4 + (5e-3,)}, {"rates": (5e-4,) * 4}),
        # five standard deviations, over two lines
        ("masks not planned", {"masks": Masks(501, 10_000)}, {"masks": Masks(-350, 10_000)}),
        ("masks not planned", {"masks": Masks(0, 0, -501, 10_000)}, {"masks": Masks(0, 0, 350, 10_000)}),
        ("replace accuracy collapsed", {"rtd_auc": 0.53}, {"rtd_auc": 0.54}),
        ("loss fell back", {"aux_loss": 5.91}, {"aux_loss": 5.89}),
        ("stuck on word frequencies", {"aux_loss": 6.75}, {"aux_loss": 6.7}),
        ("CLM learns nothing", {"clm_loss": 6.63}, {"clm_loss": 6.60}),
        ("learning rate not planned", {"learning_rate": 5.00001e-4}, {"learning_rate": 5.000000001e-4}),
        ("auxiliary too good", {"aux_accuracy": 0.91}, {"aux_accuracy": 0.89}),
        ("auxiliary too good", {"aux_loss": 0.67}, {"aux_loss": 0.69}),
        ("main too good", {"rtd_auc": 0.9985}, {"rtd_auc": 0.9975}),
        ("main too good", {"clm_loss": 2.20}, {"clm_loss": 2.23}),
        ("auxiliary too good", {"sampled_accuracy": 0.91}, {"sampled_accuracy": 0.89}),
        ("replacements are not drawn", {"sampled_accuracy": 0.2}, {"sampled_accuracy": 0.199}),
        (
            "replacements are not drawn",
            {"sampled_accuracy": 0.99, "aux_accuracy": 0.99},
            {"sampled_accuracy": 1.0, "aux_accuracy": 1.0},
        ),
    ],
)
def test_each_goes_off_at_its_mark(name: str, sick: dict[str, Any], nearly: dict[str, Any]) -> None:
    run = always if name in NEVER_BETTER else after
    assert name in said(run(**sick)), sick
    assert name not in said(run(**nearly)), nearly
    assert run is after or name not in said(after(**sick)), "it fell back, then"


@pytest.mark.parametrize(
    "sick",
    [
        {"rtd_auc": 0.505},
        {"rtd_auc": 0.44},
        {"clm_loss": 6.95},
        {"rtd_loss": 0.5},
        {"aux_loss": 6.75},
        {"aux_loss": 5.91},
    ],
)
@pytest.mark.parametrize(
    "concern",
    [
        {"train": replace(CONFIG.train, phases=[Phase(start=560, mask_probability=0.3)])},
        {"train": replace(CONFIG.train, phases=[Phase(start=555, weights=[1.0])])},
        {"early_exit": EarlyExitConfig(layers=[1], share="0 -> 0 at 56% -> 0.5 at 56%")},
    ],
)
def test_what_was_before_a_change_of_the_plan_is_forgotten(sick: dict[str, Any], concern: dict[str, Any]) -> None:
    """Models adapt for as long as behind a warm-up; what they never recover from is said then."""
    config = replace(CONFIG, **concern)
    assert said(after(**sick)) and said(after(**sick), config) == set()
    rest = [line(step, **sick) for step in range(610, 1010, 10)]
    is_memory = sick == {"aux_loss": 5.91}
    assert bool(said([*after(**sick), *rest], config)) != is_memory, "a loss that was good before is not"


def test_a_task_that_gets_harder_by_itself_is_no_collapse() -> None:
    """Draws of a model that knows frequencies only, or of a higher temperature, are found more easily."""
    (alarm,) = (one for one in ALARMS if one.name == "replace accuracy collapsed")
    falling = replace(CONFIG.corruption, temperature_schedule="linear", temperature=2.0)
    for aux, corruption, is_told in (
        (6.73, CONFIG.corruption, False),
        (5.0, falling, False),
        (5.0, CONFIG.corruption, True),
    ):
        lines = [line(step, aux_loss=aux, rtd_auc=0.7 if step < 300 else 0.53) for step in range(10, 610, 10)]
        seen = alarm.sees(History(replace(CONFIG, corruption=corruption), lines))
        assert (seen is not None) == is_told, (aux, corruption)
    early = [line(step, rtd_auc=0.7 if step <= 150 else 0.53) for step in range(10, 610, 10)]
    assert alarm.sees(History(CONFIG, early)) is None, "warm-up"


def test_nothing_learned_by_weights_that_stand_names_the_rate() -> None:
    """One cause instead of four, whose remedy is the other way round."""
    nothing = {"aux_loss": 7.0, "clm_loss": 7.0, "rtd_auc": 0.5, "rtd_loss": 0.7}
    for grown, told in (
        (0.19, {"learning rate too low"}),
        (0.21, {"worse than frequencies", "RTD says original to all", "stuck on word frequencies"}),
    ):
        lines = [
            line(step, **nothing, weights={MATRIX: (20.0 + grown * step / 600, 10**6)}) for step in range(10, 610, 10)
        ]
        assert said(lines) == told, grown


def test_what_the_configuration_gives_no_weight_is_the_only_cause_that_is_named() -> None:
    config = replace(CONFIG, objective=replace(CONFIG.objective, rtd_weight=0.0))
    head = {"weights": {"main.rtd_head.bias": (1.0, 1), MATRIX: (20.0, 10**6)}}
    sick = [
        line(step, rtd_auc=0.44, rtd_loss=0.7, weights={**head["weights"], MATRIX: (20.0 + step / 10, 10**6)})
        for step in range(10, 610, 10)
    ]
    assert said(sick, config) == {"loss of weight 0"}
    assert {"weights do not move", "detection inverted"} <= said(sick)


def test_a_step_of_any_line_may_have_been_passed_over() -> None:
    """The rate is that of the last one taken."""
    for rate, norms, is_told in (
        (RATES.at(44, 1000), (1.0,) * 5, False),
        (RATES.at(39, 1000), (1.0,), True),
        (0.0, (), False),
    ):
        assert ("learning rate not planned" in said([line(50, learning_rate=rate, norms=norms)])) == is_told
    # The line of step 40 is missing, as that step was passed over.
    both = {"norms": (1.0,) * 9, "rates": [RATES.at(step, 1000) for step in (*range(30, 39), *range(42, 50))]}
    assert "learning rate not planned" not in said([line(30), line(50, **both, first=30)])
    assert "learning rate not planned" in said([line(30), line(50, **both, first=31)])


AUXILIARY = "aux.block.layers.0.mlp.linear_fc1.weight"


@pytest.mark.parametrize(
    ("most", "named", "weight", "given"),
    [
        # (1 - 0.9) of 0.02; Muon's steps are 0.2 of its rate, and it keeps 0.95.
        (2e-3, "lr", MATRIX, {}),
        (2e-3, "lr", AUXILIARY, {}),
        (2e-3, "auxiliary_lr", AUXILIARY, {"lr": 1e-4}),
        (5e-3, "muon_lr", MATRIX, {"matrices": "muon", "lr": 1e-4}),
        (5e-3, "lr", MATRIX, {"matrices": "muon"}),
        (5e-3, "auxiliary_muon_lr", AUXILIARY, {"auxiliary_matrices": "muon", "lr": 1e-4}),
        (5e-3, "auxiliary_lr", AUXILIARY, {"auxiliary_matrices": "muon", "lr": 1e-4}),
        (2e-3, "lr", "tied.word.weight", {"matrices": "muon", "muon_lr": 1e-4}),
        (2e-3, "auxiliary_lr", "aux.head.dense.weight", {"auxiliary_matrices": "muon", "auxiliary_muon_lr": 1e-4}),
        (4e-3, "auxiliary_lr", AUXILIARY, {"lr": 1e-4, "auxiliary_lr_schedule": "0.5"}),
    ],
)
def test_each_rate_is_judged_by_the_weights_that_have_it(
    most: float, named: str, weight: str, given: dict[str, Any]
) -> None:
    (alarm,) = (one for one in ALARMS if one.name == "learning rate too high")
    for rate, is_told in ((0.99 * most, False), (1.01 * most, True)):
        optimizer = replace(CONFIG.optimizer, **{**given, named: rate})
        # The logged rate is main's.
        told = line(600, weights={weight: (20.0, 10**6)}, learning_rate=optimizer.lr)
        seen = alarm.sees(History(replace(CONFIG, optimizer=optimizer), [told]))
        assert (seen is not None and seen.startswith(f"optimizer.{named}: ")) == is_told, (rate, seen)


def test_what_stands_by_its_own_schedule_is_not_frozen() -> None:
    """The auxiliary's rate has ended, main's has not; or the other way round."""
    for name, rate, written, is_said in (
        (AUXILIARY, 5e-4, "1 -> 0 at 50%", False),
        (MATRIX, 5e-4, "1 -> 0 at 50%", True),
        (AUXILIARY, 1e-6, "1", True),
        (AUXILIARY, 1e-6, "", False),
    ):
        config = replace(CONFIG, optimizer=replace(CONFIG.optimizer, auxiliary_lr_schedule=written))
        found = said(after(weights={name: (20.0, 10**6)}, learning_rate=rate), config)
        assert ("weights do not move" in found) == is_said, (name, rate, written)


COUNTED = ("aux_loss", "aux_accuracy", "sampled_accuracy", "clm_loss", "rtd_auc", "replace_accuracy")
NOTHING = dict.fromkeys(COUNTED, np.nan)
WEAK = {"shared_grad_norm": 0.0, "stage_grad_norm": 0.0}


def test_lines_in_which_nothing_was_masked_say_nothing() -> None:
    """Neither by themselves, nor of the others; a step without masks has no gradient."""
    empty = {**NOTHING, "rtd_loss": 0.0, "replace_rate": 0.0, "masked": 0}
    assert not said(always(**empty, **WEAK))
    sick = {"aux_loss": 6.8, "clm_loss": 6.8}
    lines = [line(step, **(empty if step % 20 else sick)) for step in range(10, 610, 10)]
    assert "stuck on word frequencies" in said(lines)
    few = {"sampled_accuracy": 1.0, "replace_rate": 0.0, "rtd_loss": 0.0, "rtd_auc": np.nan}
    assert not said(always(**few, masked=4)) and said(always(**few, masked=60))
    assert "no gradient" not in said(always(**WEAK))
    assert "no gradient" in said(always(**WEAK, norms=(0.0,) * 10)) & said(always(stage_grad_norm=0.0))


def test_weights_that_rounding_holds_are_not_frozen() -> None:
    """A rate of 1e-7 is a bit of an element of 1."""
    tiny = replace(CONFIG, optimizer=replace(CONFIG.optimizer, lr=1e-7))
    standing = {"weights": {"main.block.layers.0.input_layernorm.weight": (32.0, 1024)}}
    assert "weights do not move" in said(always(**standing))
    assert "weights do not move" not in said(always(**standing, learning_rate=1e-7), tiny)


def test_a_spike_is_one_that_adam_cannot_average() -> None:
    """1 / sqrt(1 - 0.98) = 7.07 times the usual norm, after clipping; clipped ones are told from 50 times on."""
    usual = [line(step) for step in range(10, 110, 10)]
    free = replace(CONFIG, optimizer=replace(CONFIG.optimizer, clip_grad=0.0))
    for norm, config, is_told in ((7.2, free, True), (7.0, free, False), (49.0, CONFIG, False), (51.0, CONFIG, True)):
        lines = [*usual, line(110, norms=(1.0, norm))]
        assert ("norm spike" in said(lines, config)) == is_told, (norm, config.optimizer.clip_grad)
        assert "norm spike" not in said([usual[0], lines[-1]], config), "what is usual is not known yet"


def test_muons_steps_are_alike_and_add_up_to_more() -> None:
    """sqrt(5e-4 / (2 wd)) times 0.2 sqrt(1.95 / 0.05) against 0.02 / 2: 3.9."""
    for decay, is_told in ((4.0, True), (3.8, False)):
        optimizer = replace(CONFIG.optimizer, weight_decay=decay, matrices="muon")
        found = said(after(weights={MATRIX: (20.0, 10**6)}), replace(CONFIG, optimizer=optimizer))
        assert ("weight decay rules" in found) == is_told, decay


def test_half_of_the_auxiliarys_loss_is_a_leak_unless_main_is_many_times_as_large() -> None:
    small = replace(CONFIG, model=replace(CONFIG.model, auxiliary_num_layers=1, num_layers=64))
    for clm, config, is_told in ((2.0, CONFIG, True), (2.3, CONFIG, False), (2.0, small, False), (1.5, small, True)):
        assert ("main too good" in said(after(clm_loss=clm), config)) == is_told, (clm, config.model.num_layers)
    assert "main too good" not in said(after(aux_loss=15.0, clm_loss=7.0)), "the auxiliary has diverged"


def test_how_weights_began_is_remembered_in_a_long_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more log lines than are kept."""
    monkeypatch.setattr(watch_module, "MOST_LINES", 20)
    config = replace(CONFIG, train=replace(CONFIG.train, train_steps=100_000))
    watch, told, rates = Watch(config), set(), config.optimizer.learning_rate(100_000)
    for step in range(10, 610, 10):
        watch.update(Update(rates.at(step - 1, 100_000), 1.0, 0.7, 0.7, 1.0, False, False))
        watch.masked, watch.tokens = 15_000, 100_000
        figures = {**FIGURES, "learning_rate": rates.at(step - 1, 100_000)}  # losses above those of no words
        told |= {one.alarm.name for one in watch.line(step, figures, {MATRIX: (20.0 + step * 1e-6, 10**6)}, 0.0)}
    assert told == {"learning rate too low"}


def test_decay_rules_where_weights_tend_to_less_than_half() -> None:
    """sqrt(5e-4 / (2 wd)) against 0.02 / 2: 2.5; and only a run of 1 / (lr wd) steps gets there."""
    for decay, steps, is_told in ((2.6, 1000, True), (2.4, 1000, False), (2.6, 700, False)):
        optimizer, train = replace(CONFIG.optimizer, weight_decay=decay), replace(CONFIG.train, train_steps=steps)
        found = said(after(weights={MATRIX: (20.0, 10**6)}), replace(CONFIG, optimizer=optimizer, train=train))
        assert ("weight decay rules" in found) == is_told, (decay, steps)


def test_fp16_finds_its_scale_before_anything_is_said() -> None:
    fp16 = replace(CONFIG, train=replace(CONFIG.train, precision="fp16"))
    assert said(after(skipped=5, loss_scale=2.0), fp16) == set()
    assert said(after(skipped=6, loss_scale=2.0), fp16) == {"gradients not finite"}
    assert said(after(loss_scale=1.0), fp16) == {"loss scale at its floor"}
    searching = {10: (math.inf,) * 10, 20: (math.inf,) * 8 + (1.0,) * 2}
    first = [
        line(at, skipped=sum(map(math.isinf, norms)), norms=norms, loss_scale=2.0) for at, norms in searching.items()
    ]
    assert said(first[:1], fp16) == said(first, fp16) == set(), "from 2^32 down"
    assert said([line(10), *first[1:]], fp16) == {"gradients not finite"}


def test_an_alarm_is_said_once_and_again_when_it_was_away() -> None:
    watch, steps = Watch(CONFIG), iter(range(110, 10_000, 10))

    def lines(count: int, **changed: float) -> int:
        total = 0
        for _ in range(count):
            watch.update(Update(5e-4, 1.0, 0.7, 0.7, 1.0, False, False))
            total += len(watch.line(next(steps), {**FIGURES, **changed}, {}, 0.0))
        return total

    assert lines(1, stage_grad_norm=0.0) == 1
    assert lines(5, stage_grad_norm=0.0) == 0
    assert lines(QUIET_LINES - 1) == 0 and lines(1, stage_grad_norm=0.0) == 0, "it flickers"
    assert lines(QUIET_LINES) == 0 and lines(1, stage_grad_norm=0.0) == 1


@pytest.mark.parametrize(
    ("weight", "most", "given"),
    [
        # 10 steps of 5e-4 and of 0.1 / sqrt(0.02 (1 - 0.81 / 0.98)), of 10^6 elements; decay is 5e-3 of a norm of 20
        (MATRIX, 8.4895 + 1e-3, {}),
        (MATRIX, 36.374 + 1e-3, {"adam_beta2": 0.999}),
        (MATRIX, math.inf, {"adam_beta2": 0.81}),
        (MATRIX, 10 * 0.02 * 0.24 * 1e3 + 0.04, {"matrices": "muon", "muon_lr": 0.02}),
        ("tied.word.weight", 8.4895 + 1e-3, {"matrices": "muon", "muon_lr": 0.02}),
        (AUXILIARY, 84.895 + 1e-2, {"auxiliary_lr": 5e-3}),
        (AUXILIARY, 4.2448 + 5e-4, {"auxiliary_lr_schedule": "0.5"}),
    ],
)
def test_weights_get_no_farther_than_the_optimizers_steps(weight: str, most: float, given: dict[str, Any]) -> None:
    (alarm,) = (one for one in ALARMS if one.name == "weights moved too far")
    config = replace(CONFIG, optimizer=replace(CONFIG.optimizer, **given))
    for moved, is_told in ((0.99 * most, False), (1.02 * most, most < math.inf)):
        for now in (20.0 - moved, 20.0 + moved):
            lines = [line(590, weights={weight: (20.0, 10**6)}), line(600, weights={weight: (now, 10**6)})]
            seen = alarm.sees(History(config, lines))
            assert (seen is not None) == is_told, (now, seen)


def test_the_model_that_stands_is_named() -> None:
    (alarm,) = (one for one in ALARMS if one.name == "learning rate too low")
    for still, moves, figures, is_told in (
        (MATRIX, AUXILIARY, {"rtd_auc": 0.505, "rtd_loss": 0.4}, True),
        (MATRIX, AUXILIARY, {"clm_loss": 6.8}, True),
        (MATRIX, AUXILIARY, {"aux_loss": 6.8}, False),
        (AUXILIARY, MATRIX, {"aux_loss": 6.8}, True),
        (AUXILIARY, MATRIX, {"clm_loss": 6.8}, False),
    ):
        lines = [
            line(step, **figures, weights={still: (20.0, 10**6), moves: (20.0 + step / 100, 10**6)})
            for step in range(10, 610, 10)
        ]
        assert (alarm.sees(History(CONFIG, lines)) is not None) == is_told, (still, figures)
        assert not {"stuck on word frequencies", "CLM learns nothing"} & said(lines) or not is_told


def test_what_gets_below_frequencies_before_the_end_is_on_its_way() -> None:
    for fall, is_told in ((2e-3, False), (1e-4, True)):
        lines = [line(step, aux_loss=7.5 - fall * step) for step in range(10, 410, 10)]
        assert ("worse than frequencies" in said(lines)) == is_told, fall


def test_marks_of_models_that_know_frequencies_only() -> None:
    words, counts = WordFrequencies(50), np.random.default_rng(0).zipf(1.5, 20_000) % 50
    for part in np.split(counts, 20):
        words.add(part)
    shares = np.bincount(counts, minlength=50) / 20_000
    assert words.entropy() == pytest.approx(entropy(shares) + 49 / 40_000, rel=1e-12)
    assert detection_entropy(0.15) == pytest.approx(entropy([0.15, 0.85]), rel=1e-12)


def test_word_frequencies_are_those_of_the_phase() -> None:
    data, config = data_of(), small_config(train={"train_steps": 40, "phases": [Phase(start=1, weights=[1.0])]})
    watch, first = Watch(config), data.step_batch(0, 0)
    second = data.step_batch(1, first.end)
    watch.batch(first)
    watch.batch(second)
    assert watch.frequencies.counts.sum() == second.num_masked


def data_of(**concerns: Any) -> PretrainingData:
    config = small_config(**concerns)
    corpus = small_corpus(config)
    return PretrainingData(corpus.train_index, [memory_shard(seed=7)], config)


@pytest.mark.parametrize("concerns", [{}, {"data": {"row_format": "padded"}}, {"objective": {"mask_probability": 0.6}}])
def test_masks_are_as_many_and_where_they_are_planned(concerns: dict[str, Any]) -> None:
    data, config, first, masks = data_of(**concerns), small_config(**concerns), 0, Masks()
    for step in range(20):
        batch = data.step_batch(step, first)
        first = batch.end
        masks = sum((masks_of(one, config) for one in batch.micro_batches), masks)
    assert masks.count**2 < 9 * masks.count_variance and masks.places**2 < 9 * masks.places_variance
    assert masks.count_variance > 20 and masks.places_variance > 1e4
    unknown = replace(batch.micro_batches[0], tokens=torch.full_like(batch.micro_batches[0].tokens, 3))
    assert masks_of(unknown, config) == Masks(), "special ids are masked last"


def test_a_sample_comes_once_an_epoch() -> None:
    data, watch = data_of(), Watch(small_config())
    for first, again in ((0, 0.0), (24, 0.0), (12, 1.0)):
        watch.batch(data.step_batch(0, first))
        watch.line(1, FIGURES, {}, 0.0)
        assert watch.lines[-1].again == again
    watch.batch(data.step_batch(0, 0))
    watch.line(1, FIGURES, {}, 0.01)
    assert watch.lines[-1].again == 0.0, "later epochs bring them again"


def test_samples_are_known_again_wherever_they_lie_and_new_epochs_are_planned() -> None:
    packed, padded = data_of().step_batch(0, 0), data_of(data={"row_format": "padded"}).step_batch(0, 0)
    seen = [sorted(np.concatenate([sample_hashes(one) for one in batch.micro_batches])) for batch in (packed, padded)]
    assert seen[0] == seen[1] and len(set(seen[0])) == 24
    data, watch, first, planned = data_of(), Watch(small_config()), 0, []
    for step in range(40):
        batch = data.step_batch(step, first)
        watch.batch(batch)
        planned.append(data.read_before(first, batch.end))
        first = batch.end
        watch.line(step, FIGURES, {}, planned[-1])
        assert watch.lines[-1].repeated == pytest.approx(0.0, abs=0.1), "but for a few that are alike"
    assert planned[0] == 0.0 and planned[-1] == 1.0
