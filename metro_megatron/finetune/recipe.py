"""How to fine-tune, without what fine-tuning needs."""

import os
from dataclasses import dataclass, field
from typing import Annotated, Literal

from metro_megatron.cli.options import Range, at_least, flatten, options_of, out_of_range

BALANCED = ["balanced"]


@dataclass(frozen=True)
class Recipe:
    """How to train: METRO Table 11."""

    learning_rate: Annotated[float, at_least(0)] = 3e-5
    """Peak learning rate; METRO tries 1e-5, 3e-5 and 5e-5 at base size."""
    layer_decay: Annotated[float, Range(0, 1, has_low=False, has_high=True)] = 1.0
    """Every layer's learning rate is that of the layer above times this; METRO 1, ELECTRA 0.8 or 0.9."""
    batch_size: Annotated[int, at_least(1)] = 32
    """Texts per step, those of all processes and accumulated ones together."""
    gradient_accumulation_steps: Annotated[int, at_least(1)] = 1
    """Parts in which a process computes its texts of a step."""
    batching: Literal["random", "length", "packed"] = "random"
    """Texts of a step: any, padded; such as have about the same length; or any, side by side in rows without much
    padding, which METRO-LM's encoders read."""
    epochs: Annotated[int, at_least(1)] = 3
    """Passes over the training texts; METRO takes up to 10."""
    keep_best: bool = False
    """Keep the model of the epoch with the best first score, instead of the last epoch's."""
    patience: Annotated[int, at_least(0)] = 0
    """End after so many epochs without a better first score; 0: never."""
    warmup_steps: Annotated[int, at_least(0)] = 100
    """Steps of linear warm-up, at most half of all steps."""
    weight_decay: Annotated[float, at_least(0)] = 0.01
    """Decoupled weight decay of matrices."""
    task_dropout: Annotated[float, Range(0, 1)] = 0.1
    """Dropout of the head, whatever the model's configuration says; METRO 0.1, and at its largest sizes also 0.15."""
    clip_grad: Annotated[float, at_least(0)] = 1.0
    """Largest gradient norm; 0 switches clipping off."""
    class_weights: list[str] = field(default_factory=list)
    """Weights of the classes in the loss: one for each, in the order of metrics.json's labels, or balanced."""
    pdr: Literal["none", "symkl", "symkl_detached", "kl", "js", "hellinger"] = "none"
    """Posterior differential regularization: the divergence from outputs whose token embeddings have noise."""
    pdr_weight: Annotated[float, at_least(0)] = 1.0
    """Factor of that divergence in the loss (METRO eq. 11, alpha)."""
    pdr_radius: Annotated[float, at_least(0)] = 1e-5
    """Largest noise of an element, or its standard deviation (METRO does not say it)."""
    pdr_noise: Literal["uniform", "normal"] = "uniform"
    """How the noise of an element is drawn."""
    max_length: Annotated[int, at_least(0)] = 0
    """Tokens at which texts are cut; 0 takes as many as model and tokenizer allow."""
    tokenizer: str = ""
    """Folder of the model's tokenizer; empty: that of the model."""
    seed: Annotated[int, at_least(0)] = 1
    """Seed of the fresh head, the order of the texts, dropout and noise."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: matrix products in bfloat16, weights, embeddings, norms and losses in fp32."""
    from_scratch: bool = False
    """Start from random weights instead of the pretrained ones, for comparison."""

    def problems(self) -> list[str]:
        """What is wrong with it."""
        import torch

        found = out_of_range({option.name: option for option in options_of(Recipe)}, flatten(self))
        if self.device == "cuda" and not torch.cuda.is_available():
            found.append("device is cuda, but torch finds no GPU; use auto or cpu")
        parts = num_processes() * max(self.gradient_accumulation_steps, 1)
        if self.batch_size % parts:
            found.append(
                f"batch_size is {self.batch_size}, no multiple of {num_processes()} processes times "
                f"gradient_accumulation_steps {self.gradient_accumulation_steps}; give a multiple of {parts}"
            )
        if self.class_weights != BALANCED:
            found += [
                f"class_weights has {weight!r}; give balanced, or a number greater than 0 for each class"
                for weight in self.class_weights
                if not _is_positive(weight)
            ]
        return found


def num_processes() -> int:
    """As many as torchrun has started."""
    return int(os.environ.get("WORLD_SIZE", 1))


def _is_positive(text: str) -> bool:
    try:
        return 0 < float(text) < float("inf")
    except ValueError:
        return False
