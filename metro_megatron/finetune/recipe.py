"""How to fine-tune, without what fine-tuning needs."""

from dataclasses import dataclass
from typing import Annotated, Literal

from metro_megatron.cli.options import at_least, flatten, options_of, out_of_range


@dataclass(frozen=True)
class Recipe:
    """How to train: METRO Table 11."""

    learning_rate: Annotated[float, at_least(0)] = 3e-5
    """Peak learning rate; METRO tries 1e-5, 3e-5 and 5e-5 at base size."""
    batch_size: Annotated[int, at_least(1)] = 32
    """Texts per step."""
    epochs: Annotated[int, at_least(1)] = 3
    """Passes over train_file; METRO takes up to 10."""
    warmup_steps: Annotated[int, at_least(0)] = 100
    """Steps of linear warm-up, at most half of all steps."""
    weight_decay: Annotated[float, at_least(0)] = 0.01
    """Decoupled weight decay of matrices."""
    clip_grad: Annotated[float, at_least(0)] = 1.0
    """Largest gradient norm; 0 switches clipping off."""
    max_length: Annotated[int, at_least(0)] = 0
    """Tokens at which texts are cut; 0 takes as many as the model has positions."""
    tokenizer: str = ""
    """Folder of the model's tokenizer; empty: that of the model."""
    seed: Annotated[int, at_least(0)] = 1
    """Seed of the fresh head, the order of the texts and dropout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""
    from_scratch: bool = False
    """Start from random weights instead of the pretrained ones, for comparison."""

    def problems(self) -> list[str]:
        """What is wrong with it."""
        import torch

        found = out_of_range({option.name: option for option in options_of(Recipe)}, flatten(self))
        if self.device == "cuda" and not torch.cuda.is_available():
            found.append("device is cuda, but torch finds no GPU; use auto or cpu")
        return found
