"""One bit on one rank is named, wherever it is replicated."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from metro_megatron.config.schema import Config
from metro_megatron.errors import UserError
from metro_megatron.health.replicas import diverged
from metro_megatron.model.init import global_parameters, split_dimension
from tests.distributed import run_ranks
from tests.parity.small_run import small_config, start


def found_on_rank(config: Config) -> list[tuple[str, bool, list[str]]]:
    """(parameter, whether it is replicated, what is found) with its smallest bit flipped on the last rank."""
    trainer = start(config)
    assert diverged(trainer.pair, trainer.layout) == []
    is_alone = trainer.layout.data.size() == 1
    found = []
    for prefix, module in trainer.pair.modules():
        for name, parameter in global_parameters(module, prefix):
            bits = parameter.detach().view(-1).view(torch.int32)
            is_flipped = trainer.layout.rank == trainer.layout.world.size() - 1
            bits[-1] ^= int(is_flipped)
            is_replicated = not is_alone or split_dimension(parameter) is None
            found.append((name, is_replicated, diverged(trainer.pair, trainer.layout)))
            bits[-1] ^= int(is_flipped)
    if trainer.layout.tensor.size() > 1:  # data-parallel ranks have just fetched what is one rank's
        whole = next(one for one in trainer.pair.main[0].parameters() if split_dimension(one) is None)
        whole.data[0] += trainer.layout.rank
        with pytest.raises(UserError, match="ranks that should hold the same hold other values of main"):
            trainer.save()
    trainer.close()
    return found


@pytest.mark.parametrize("parallel", [{}, {"tensor_model_parallel_size": 2}], ids=["dp2", "tp2"])
def test_one_bit_is_named_and_no_checkpoint_is_made_of_it(tmp_path: Path, parallel: dict[str, int]) -> None:
    config = small_config(parallel=parallel, train={"output": str(tmp_path)})
    for of_rank in run_ranks(found_on_rank, 2, config):
        for name, is_replicated, names in of_rank:
            assert names == ([name] if is_replicated else []), name
    assert not list(tmp_path.glob("iter_*"))
