"""What changes over a run, derived from its options: the one list that configuration, training and picture read."""

from metro_megatron.config.schema import Config, OptimizerConfig
from metro_megatron.schedule import Point, Schedule


def schedules(config: Config) -> dict[str, Schedule]:
    """Every schedule of a run; a name is dotted like those of options, section first."""
    return {"optimizer.learning_rate": learning_rate(config.optimizer, config.train.train_steps)}


def schedule_lines(config: Config, section: str) -> list[str]:
    """YAML comments that show the schedules of one section of the configuration."""
    named = [(name.partition("."), schedule) for name, schedule in schedules(config).items()]
    return [f"  # {name.replace('_', ' ')}: {schedule}" for (own, _, name), schedule in named if own == section]


def learning_rate(optimizer: OptimizerConfig, train_steps: int) -> Schedule:
    """Linear from 0 to lr over the warm-up, then linear to 0 at train_steps."""
    peak, end = Point(optimizer.lr, optimizer.lr_warmup_steps), Point(0.0, train_steps)
    return Schedule(0.0, (peak, end)) if optimizer.lr_warmup_steps else Schedule(optimizer.lr, (end,))
