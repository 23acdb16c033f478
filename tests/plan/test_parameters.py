"""Parameters are the integers of METRO's sizes, and those of what is built."""

import pytest

from metro_megatron.config.file import parse_config
from metro_megatron.plan.parameters import SHARED, auxiliary, main_encoder, parts, trained
from tests.parity.small_run import small_config, start
from tests.plan.builds import BUILDS


@pytest.mark.parametrize(
    ("preset", "main", "own"),
    [
        ("base", 183_753_996, 29_467_148),
        ("large_pp", 433_909_776, 77_285_392),
        ("xl", 1_557_322_776, 229_945_880),
        ("xxl", 5_364_311_080, 637_437_480),
    ],
)
def test_metros_sizes(preset: str, main: int, own: int) -> None:
    """Of METRO Table 3, main with the embedding (184M, 434M, 1.6B, 5.4B); every parameter once in the sum."""
    config = parse_config(["--config", preset])
    assert (main_encoder(config), auxiliary(config)) == (main, own)
    heads = config.model.hidden_size + 1 + config.model.vocab_size
    assert trained(config) == main + own + heads


def test_vocabulary_rows_are_padded() -> None:
    """128,001 ids have 128,128 rows: 128 more in the table and in both heads' biases."""
    plain, padded = (parse_config(["--model.vocab_size", str(size)]) for size in (128_000, 128_001))
    assert trained(padded) - trained(plain) == 128 * (768 + 2)


@pytest.mark.parametrize("name", BUILDS)
def test_parameters_of_a_build(name: str) -> None:
    """Every module has as many as its home's components."""
    config = small_config(**BUILDS[name])
    trainer = start(config)
    built = {
        prefix: sum(parameter.numel() for parameter in module.parameters()) for prefix, module in trainer.pair.modules()
    }
    trainer.close()
    planned = dict.fromkeys(built, 0)
    for part in parts(config):
        planned[{"tied": "tied.", "auxiliary": "aux."}.get(part.home, "main.")] += part.total
    assert planned == built
    assert sum(built.values()) == trained(config)
    assert {part.home for part in parts(config)} <= {*SHARED, "first", "layers", "last"}
