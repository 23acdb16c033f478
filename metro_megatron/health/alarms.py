"""The alarms: what a sick run shows in the figures of its log lines, what it comes from, and what helps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from metro_megatron.health import signs, steps
from metro_megatron.health.history import History


@dataclass(frozen=True)
class Alarm:
    """One illness."""

    name: str
    cause: str
    remedy: str
    sees: Callable[[History], str | None]
    """What shows it now, in figures; None: nothing does."""


ALARMS: tuple[Alarm, ...] = (
    Alarm(
        "gradients not finite",
        "overflow: a rate too high for the precision, a broken device, or a loss of infinity",
        "lower optimizer.lr or optimizer.clip_grad, or use train.precision bf16 or fp32",
        steps.not_finite,
    ),
    Alarm(
        "loss scale at its floor",
        "gradients overflow fp16 whatever the scale",
        "use train.precision bf16, or lower optimizer.lr",
        steps.loss_scale_at_floor,
    ),
    Alarm(
        "norm spike",
        "one step outweighs all that Adam remembers: odd data, or weights at the edge of divergence",
        "look at the step with tools/inspect_data.py --step; set optimizer.clip_grad, lower optimizer.lr",
        steps.norm_spike,
    ),
    Alarm(
        "no gradient",
        "a loss of weight 0, or one cut off from the weights",
        "look at the weights of objective.*",
        steps.no_gradient,
    ),
    Alarm(
        "loss of weight 0",
        "main does not learn what the configuration gives no weight",
        "give it a weight, or leave its term out of objective.main",
        signs.weightless,
    ),
    Alarm(
        "learning rate not planned",
        "the steps taken have not the rate that the configuration gives them",
        "look at what changed the schedule, or the step that it is asked for",
        steps.rate_not_planned,
    ),
    Alarm(
        "weights moved too far",
        "steps are not those of the optimizer's rule at its planned rate, or something else writes weights",
        "look at what changed the optimizer, the rates of its groups of parameters, or the weights",
        steps.moved_too_far,
    ),
    Alarm(
        "masks not planned",
        "how many tokens are masked, or where, is not what the configuration gives",
        "look at what changed data/masking.py",
        steps.masks_not_planned,
    ),
    Alarm(
        "replacements not as drawn",
        "main reads other tokens than those that were drawn, or what is named at masks is not the text's",
        "look at what lies between the draws and main, and at the targets",
        steps.not_as_drawn,
    ),
    Alarm(
        "learning rate too high",
        "weights are rewritten faster than Adam, or Muon, averages",
        "lower the option that is named",
        steps.rate_too_high,
    ),
    Alarm(
        "learning rate too low",
        "weights hardly move, so that nothing is learned",
        "raise optimizer.lr, start with smaller weights, or look for what makes its steps smaller",
        signs.rate_too_low,
    ),
    Alarm(
        "epsilon rules Adam",
        "optimizer.adam_eps is larger than gradients are, and updates shrink with them",
        "lower optimizer.adam_eps",
        steps.epsilon_rules,
    ),
    Alarm(
        "weight decay rules",
        "optimizer.weight_decay shrinks weights more than gradients move them",
        "lower optimizer.weight_decay",
        steps.decay_rules,
    ),
    Alarm(
        "weights do not move",
        "the optimizer leaves them out, or no gradient reaches them, or one far below adam_eps, as of a loss without "
        "weight, or 16 bits round their steps away",
        "look at what changed the weight of their loss, the model or the optimizer: the plain program moves all",
        steps.frozen,
    ),
    Alarm(
        "repeated data",
        "the order gives the same samples again, or the shards hold copies",
        "look at data.train for copies (tools/inspect_data.py), and at what changed the order",
        steps.repeated,
    ),
    Alarm(
        "auxiliary too good",
        "it sees the originals, the text repeats itself, or it is too large: little is left to detect",
        "look for what shows it the originals, and for copies in the shards; then make it smaller or "
        "objective.mask_probability higher",
        signs.auxiliary_too_good,
    ),
    Alarm(
        "main too good",
        "it sees the originals, or which tokens were replaced; or the text repeats itself",
        "look for what shows main, or its heads, the answers, and for copies in the shards",
        signs.main_too_good,
    ),
    Alarm(
        "worse than frequencies",
        "a learning rate too high, gradients that are not those of the losses, or a loss of weight 0",
        "lower optimizer.lr or lengthen optimizer.lr_warmup_steps",
        signs.worse_than_frequencies,
    ),
    Alarm(
        "detection inverted",
        "labels or logits of replaced token detection have the wrong sign",
        "1 is original in the loss, 0 replaced: look at what changed either",
        signs.detection_inverted,
    ),
    Alarm(
        "RTD learns other labels",
        "its loss is not that of which tokens were replaced: other labels, or other tokens than all",
        "look at what changed the labels, or what RTD's loss is a mean over",
        signs.other_labels,
    ),
    Alarm(
        "RTD says original to all",
        "main does not see what was replaced: its loss weighs too little, or its rate kills it",
        "look at objective.rtd_weight; lower optimizer.lr, raise the samples of a step",
        signs.all_original,
    ),
    Alarm(
        "replace accuracy collapsed",
        "main diverged",
        "go back to a checkpoint before it with a lower optimizer.lr or optimizer.clip_grad",
        signs.detection_collapsed,
    ),
    Alarm(
        "loss fell back",
        "the model diverged",
        "go back to a checkpoint before it with a lower optimizer.lr or optimizer.clip_grad",
        signs.loss_fell_back,
    ),
    Alarm(
        "stuck on word frequencies",
        "rate, warm-up, batch or start do not let the model leave the plateau, or targets are not those of the text, "
        "or its words have no order, as in shards that were made wrongly",
        "change optimizer.lr or the samples of a step, start positions smaller, or train longer",
        signs.plateau,
    ),
    Alarm(
        "CLM learns nothing",
        "main's language model gets no gradient, wrong targets, or is drowned by replaced token detection",
        "lower objective.rtd_weight or optimizer.lr, raise objective.clm_weight or the samples of a step",
        signs.clm_learns_nothing,
    ),
    Alarm(
        "replacements are not drawn",
        "the likeliest word is taken, as without noise or at temperature 0",
        "set corruption.temperature to 1",
        signs.always_the_likeliest,
    ),
)
"""In the order in which they are said: nearer causes first."""
