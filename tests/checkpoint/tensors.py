"""All tensors of a checkpoint at once, which the program reads one by one."""

from pathlib import Path

from torch import Tensor

from metro_megatron.checkpoint.read import StoredModel


def read_model_tensors(iteration_folder: Path) -> dict[str, Tensor]:
    """Every tensor of the model. Raises UserError as StoredModel.open."""
    model = StoredModel.open(iteration_folder)
    return model.read(model.stored)
