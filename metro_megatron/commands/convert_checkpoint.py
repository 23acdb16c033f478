"""Turn a training checkpoint into a folder for transformers."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from metro_megatron.cli.command_line import run_tool, tool_command
from metro_megatron.config.schema import Config
from metro_megatron.files import refuse_foreign


@dataclass(frozen=True)
class Options:
    """From where to where."""

    load: str
    """A run folder (its newest checkpoint is taken) or one of its iter_ folders."""
    output: str
    """Folder to write: config.json, model.safetensors, tokenizer, modeling code and model card."""


def main(options: Options) -> None:
    """Turn a training checkpoint into a folder for transformers.

    The folder appears only after its outputs (hidden states and the logits of every head) were found equal to the
    trainer's own model within 1e-4 in fp32. An earlier export at the same place is replaced.
    """
    # Late, so that --help and mistakes do not wait for torch.
    from transformers.utils import logging

    from metro_megatron.checkpoint.read import find_iteration, find_tokenizer, read_model_tensors, stored_config
    from metro_megatron.hf.export import EXPORTED_FILES, exported_model, exported_tensors, write_hf_folder

    warnings.filterwarnings("ignore", module=r"megatron\.")  # about optional packages and its own old calls
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    iteration, target = find_iteration(Path(options.load)), Path(options.output)
    refuse_foreign(target, EXPORTED_FILES)
    config = stored_config(iteration)
    tensors = exported_tensors(read_model_tensors(iteration), config)
    num_parameters = sum(tensor.numel() for tensor in tensors.values())
    print(
        f"{iteration}: {len(tensors)} tensors, {num_parameters / 1e6:.1f}M parameters; writing and comparing",
        flush=True,
    )
    write_hf_folder(
        target,
        tensors,
        exported_model(config),
        find_tokenizer(iteration),
        training_facts(iteration, config),
        lambda folder: compare_with_trainer(folder, iteration, config),
        config.objective.main,
    )
    print(
        f"made {target}, a Hugging Face folder with model card and code\n"
        f"next: {tool_command('finetune')} --model {target} --task classification "
        "--train_file TRAIN.csv --validation_file VALIDATION.csv --output DIR\n"
        f'or:   transformers.AutoModel.from_pretrained("{target}", trust_remote_code=True)'
    )


def training_facts(iteration: Path, config: Config) -> dict[str, object]:
    """What the model card says about the run: facts, and sections for what it read, cost and learned."""
    from metro_megatron.checkpoint.average import average_facts
    from metro_megatron.train.run_facts import run_sections

    return {
        "checkpoint": iteration.name,
        **average_facts(iteration),
        "steps of the whole run": config.train.train_steps,
        "global batch": (
            f"{config.train.global_batch_size} samples of at most {config.data.seq_length} tokens"
            if config.train.global_batch_size
            else f"{config.train.global_batch_tokens} tokens in samples of at most {config.data.seq_length}"
        ),
        "peak learning rate": config.optimizer.lr,
        "mask probability": config.objective.mask_probability,
        **({"phases": "; ".join(map(str, config.train.phases))} if config.train.phases else {}),
        "vocabulary": config.model.vocab_size,
        "seed": str(config.train.seed),
        **run_sections(iteration, config),
    }


def compare_with_trainer(folder: Path, iteration: Path, config: Config) -> dict[str, object]:
    """Print and return the largest difference of every output. Raises UserError if one is too large."""
    from metro_megatron.hf.verify import hf_outputs, largest_differences, random_probe, refuse_differences
    from metro_megatron.train.unsharded import trainer_outputs

    probe = random_probe(config.model)
    differences = largest_differences(
        hf_outputs(folder, probe), trainer_outputs(iteration, config, *probe), probe.lengths
    )
    figures = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
    print(f"largest differences to the trainer's model over {int(probe.lengths.sum())} tokens: {figures}")
    refuse_differences(differences)
    return {"largest difference to the trainer's outputs (fp32)": figures}


run = partial(run_tool, main)
"""The console script."""
