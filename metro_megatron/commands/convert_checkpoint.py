"""Turn a training checkpoint into a folder for transformers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

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
    format: Literal["metro", "electra"] = "metro"
    """metro: the whole pair with all heads. electra: in it two folders, generator and discriminator, of transformers'
    own classes, without code; for models that are ELECTRA's."""


def main(options: Options) -> None:
    """Turn a training checkpoint into a folder for transformers.

    The folder appears only after its outputs (hidden states and the logits of every head) were found equal to the
    trainer's own model within 1e-4 in fp32. An earlier export at the same place is replaced.
    """
    # Late, so that --help and mistakes do not wait for torch.
    from transformers.utils import logging

    from metro_megatron.checkpoint.read import StoredModel, find_iteration, find_segments, find_tokenizer, stored_config
    from metro_megatron.hf.electra import electra_roles, read_segments, write_electra_folders
    from metro_megatron.hf.export import EXPORTED_FILES, MARK, exported_model, exported_tensors, write_hf_folder

    warnings.filterwarnings("ignore", module=r"megatron\.")  # about optional packages and its own old calls
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    iteration, target = find_iteration(Path(options.load)), Path(options.output)
    config = stored_config(iteration)
    objective = config.objective
    write: Callable[..., None] = partial(
        write_hf_folder,
        rtd_weight=objective.rtd_weight,
        clm_weight=objective.clm_weight,
        mask_probability=config.by_phase[-1].objective.mask_probability,
    )
    folders = [target]
    if options.format == "electra":
        roles = electra_roles(exported_model(config), objective.main)
        write = partial(write_electra_folders, kept=read_segments(find_segments(iteration)))
        folders = [target / role for role in roles]
    else:
        refuse_foreign(target, EXPORTED_FILES, MARK)
    stored = StoredModel.open(iteration)
    tensors = exported_tensors(stored.readers, config)
    num_parameters = sum(stored.stored[name].size.numel() for name in tensors)
    print(
        f"{iteration}: {len(tensors)} tensors, {num_parameters / 1e6:.1f}M parameters; writing and comparing",
        flush=True,
    )
    write(
        target,
        tensors,
        exported_model(config),
        find_tokenizer(iteration),
        training_facts(iteration, config),
        lambda folder: compare_with_trainer(folder, iteration, config, options.format),
        objective.main,
    )
    print(_made(folders, options.format, objective.main))


def _made(folders: list[Path], form: str, objectives: Sequence[str]) -> str:
    """What there is now, and what to do with it."""
    last = folders[-1]
    next_one = (
        f"next: {tool_command('finetune')} --model {last} --task classification "
        "--train_file TRAIN.csv --validation_file VALIDATION.csv --output DIR"
    )
    if form == "metro":
        return (
            f"made {last}, a Hugging Face folder with model card and code\n{next_one}\n"
            f'or:   transformers.AutoModel.from_pretrained("{last}", trust_remote_code=True)'
        )
    left = [name for name in objectives if name != "rtd"]
    without = f"; ELECTRA has no head of {' or '.join(left)}, which stayed behind" if left else ""
    return (
        f"made {' and '.join(map(str, folders))}, of transformers' own classes{without}\n{next_one}\n"
        f'or:   transformers.AutoModelForPreTraining.from_pretrained("{last}")'
    )


def training_facts(iteration: Path, config: Config) -> dict[str, object]:
    """What the model card says about the run: facts, and sections for what it read, cost and learned."""
    from metro_megatron.checkpoint.average import average_facts
    from metro_megatron.train.run_facts import run_sections

    begun = [Path(one).name for one in config.train.initialize_from]
    return {
        "checkpoint": iteration.name,
        **average_facts(iteration),
        "steps of the whole run": config.train.train_steps,
        "global batch": (
            f"{config.train.global_batch_size} samples of at most {config.data.seq_length} tokens"
            if config.train.global_batch_size
            else f"{config.train.global_batch_tokens} tokens in samples of at most {config.data.seq_length}"
        ),
        **({"began with the weights of": ", ".join(begun)} if begun else {}),
        "peak learning rate": config.optimizer.lr,
        "mask probability": config.objective.mask_probability,
        **({"phases": "; ".join(map(str, config.train.phases))} if config.train.phases else {}),
        "vocabulary": config.model.vocab_size,
        "seed": str(config.train.seed),
        **run_sections(iteration, config),
    }


def compare_with_trainer(folder: Path, iteration: Path, config: Config, form: str) -> dict[str, object]:
    """Print and return the largest difference of every output. Raises UserError if one is too large."""
    from metro_megatron.hf import verify
    from metro_megatron.train.unsharded import trainer_outputs

    probe = verify.random_probe(config.model)
    ours = trainer_outputs(iteration, config, *probe)
    outputs = (verify.electra_outputs if form == "electra" else verify.hf_outputs)(folder, probe)
    kept = {name: one for name, one in ours.items() if form == "metro" or name in outputs}
    differences = verify.largest_differences(outputs, kept, probe.lengths)
    figures = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
    print(f"largest differences to the trainer's model over {int(probe.lengths.sum())} tokens: {figures}")
    verify.refuse_differences(differences)
    return {"largest difference to the trainer's outputs (fp32)": figures}


run = partial(run_tool, main)
"""The console script."""
