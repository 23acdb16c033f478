"""The frozen model of a run, from a folder of any kind, checked before anything of the run is built.

A folder is a run's (or one of its checkpoints), one that tools/convert_checkpoint.py wrote, or that of any masked
language model of transformers; nothing is fetched and no code of the folder is run. In all three it becomes a model of
transformers: of a pair the auxiliary, of a run of plain masked language modelling main.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedModel
from transformers.utils import logging

from metro_megatron.checkpoint.files import METADATA, TRACKER, checkpoint_sha256
from metro_megatron.checkpoint.read import StoredModel, find_iteration, find_tokenizer, stored_config
from metro_megatron.config.schema import Config
from metro_megatron.errors import UserError
from metro_megatron.files import file_sha256
from metro_megatron.hf.configuration_metro import MetroConfig
from metro_megatron.hf.export import exported_model, exported_tensors, metro_config
from metro_megatron.hf.folder import folder_model
from metro_megatron.hf.modeling_metro import MetroForAuxiliaryMaskedLM, MetroForMaskedLM
from metro_megatron.hf.token_ids import other_ids
from metro_megatron.hf.weights import hf_state_dict

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


class FrozenFolder:
    """A folder with a masked language model. Raises UserError for any other."""

    def __init__(self, path: str):
        folder = Path(path)
        self.is_run = any((folder / name).is_file() for name in (TRACKER, METADATA))
        if not self.is_run and not (folder / "config.json").is_file():
            raise UserError(
                f"corruption.frozen_model {path}: neither a run folder or checkpoint nor a folder with a config.json; "
                "give train.output of a run, a folder that tools/convert_checkpoint.py wrote, or that of a masked "
                "language model of transformers"
            )
        self.path = find_iteration(folder) if self.is_run else folder

    @property
    def is_ours(self) -> bool:
        """Whether it holds a pair of ours."""
        return self.is_run or self._content().get("model_type") == MetroConfig.model_type

    @property
    def tokenizer(self) -> Path:
        """Folder of its tokenizer."""
        return find_tokenizer(self.path) if self.is_run else self.path

    @property
    def sha256(self) -> str:
        """Of its weights and its configuration."""
        if self.is_run:
            return checkpoint_sha256(self.path)
        found = hashlib.sha256()
        for path in sorted(path for pattern in ("config.json", *_WEIGHTS) for path in self.path.glob(pattern)):
            found.update(bytes.fromhex(file_sha256(path)))
        return found.hexdigest()

    def problems(self, config: Config, tokenizer: Path) -> list[str]:
        """Why it cannot fill the masks of a run, whose tokenizer is that of the other folder.

        Raises UserError if it is no masked language model at all.
        """
        shape = self._unfilled()
        positions, lengths = _most_positions(shape), [phase.data.seq_length for phase in config.by_phase]
        length = max(lengths)
        number = lengths.index(length)
        name = f"seq_length of phase {number} of train.phases" if number else "data.seq_length"
        found = []
        if positions is not None and positions < length:
            found.append(
                f"corruption.frozen_model {self.path} has {positions} positions, {name} is {length}; lower "
                "the second, which needs no new shards, or give another model"
            )
        rows = shape.config.vocab_size
        if rows < config.model.vocab_size:
            found.append(
                f"corruption.frozen_model {self.path} has {rows} ids, the run {config.model.vocab_size}; give a model "
                "that was trained with the run's tokenizer"
            )
        name = f"corruption.frozen_model {self.path}"
        return [*found, *other_ids(name, self.tokenizer, tokenizer, config.model.vocab_size)]

    def load(self) -> PreTrainedModel:
        """The model in fp32 on the CPU.

        Raises UserError if its weights are not whole, or not finite, or its logits are not those of a linear output
        layer.
        """
        logging.disable_progress_bar()
        model = self._of_run() if self.is_run else self._of_folder()
        if bad := [name for name, tensor in model.named_parameters() if not tensor.isfinite().all()]:
            raise UserError(
                f"corruption.frozen_model {self.path}: values of {', '.join(bad[:3])} ({len(bad)} tensors in all) are "
                "no finite numbers; give another copy, or model"
            )
        _refuse_other_heads(model.eval(), self.path)
        return model

    def _of_run(self) -> PreTrainedModel:
        config, model = stored_config(self.path), self._unfilled()
        tensors = exported_tensors(StoredModel.open(self.path).readers, config)
        state = hf_state_dict(tensors, exported_model(config), config.objective.main)
        own = {name: tensor for name, tensor in state.items() if name in model.state_dict()}
        model.load_state_dict(own, strict=True, assign=True)
        model.tie_weights()
        return model

    def _of_folder(self) -> PreTrainedModel:
        """transformers would start what is missing at random, and say so at the side."""
        kind: Any = type(self._unfilled())
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()
        try:
            model, report = folder_model(kind, self.path)
        except UserError as error:
            raise UserError([f"corruption.frozen_model {problem}" for problem in error.problems]) from error
        finally:
            logging.set_verbosity(verbosity)
        if report["missing_keys"]:
            raise UserError(
                f"corruption.frozen_model {self.path}: no masked language model, {min(report['missing_keys'])} is "
                "missing; give the folder of a model with the head that it was pretrained with"
            )
        return model

    def _unfilled(self) -> PreTrainedModel:
        """The model without weights. Raises UserError where it fills no masks."""
        config = self._config()
        problem = "it reads from left to right"
        if not (getattr(config, "is_decoder", False) or config.is_encoder_decoder):
            try:
                with torch.device("meta"):
                    if not isinstance(config, MetroConfig):
                        return AutoModelForMaskedLM.from_config(config)
                    if config.num_auxiliary_layers:
                        return MetroForAuxiliaryMaskedLM(config)
                    if "mlm" in config.objectives:
                        return MetroForMaskedLM(config)
                problem = f"it has no auxiliary, and main learned {' '.join(config.objectives)}"
            except ValueError as error:
                problem = _in_short(error)
        raise UserError(
            f"corruption.frozen_model {self.path}: no masked language model ({problem}); give one, such as a run with "
            "corruption.source auxiliary or objective.main mlm"
        )

    def _config(self) -> PretrainedConfig:
        if self.is_run:
            config = stored_config(self.path)
            return metro_config(exported_model(config), config.objective.main)
        kind: Any = MetroConfig if self.is_ours else AutoConfig
        try:
            found: PretrainedConfig = kind.from_pretrained(self.path, local_files_only=True, trust_remote_code=False)
            return found
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise UserError(
                f"corruption.frozen_model {self.path}: transformers cannot read its configuration "
                f"({_in_short(error)}); give another folder"
            ) from error

    def _content(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self.path / "config.json").read_bytes()))
        except (ValueError, TypeError) as error:
            raise UserError(f"{self.path / 'config.json'}: damaged ({error}); give another folder") from error


def refuse_other_model(config: Config, tokenizer: Path) -> FrozenFolder:
    """The folder of corruption.frozen_model, which fits a run with the tokenizer of the other folder.

    Raises UserError naming all that keeps it from filling the run's masks.
    """
    folder = FrozenFolder(config.corruption.frozen_model)
    found = folder.problems(config, tokenizer)
    if found:
        raise UserError(found)
    return folder


def _in_short(error: Exception) -> str:
    """The first sentence of transformers' messages, which go on for pages."""
    return " ".join(str(error).split()).split(". ")[0].rstrip(".")


def _most_positions(model: PreTrainedModel) -> int | None:
    """Tokens of the longest row; None where positions are only relative.

    A table whose rows begin behind that of padding (RoBERTa's) holds as many fewer.
    """
    tables = [one for name, one in model.named_modules() if name.rpartition(".")[2] == "position_embeddings"]
    sizes = [
        one.num_embeddings - (0 if one.padding_idx is None else one.padding_idx + 1)
        for one in tables
        if isinstance(one, nn.Embedding)
    ]
    return min(sizes, default=None)


@torch.no_grad()
def _refuse_other_heads(model: PreTrainedModel, path: Path) -> None:
    """Raise UserError unless logits are rows weight^T + bias of the output layer."""
    layer, seen = model.get_output_embeddings(), []
    if isinstance(layer, nn.Linear):
        handle = layer.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
        ids = torch.arange(1, 5)[None]
        logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        handle.remove()
        if seen and torch.equal(functional.linear(seen[0], layer.weight, layer.bias), logits):
            return
    raise UserError(
        f"{path}: the logits of {type(model).__name__} are not those of a linear output layer, from which replacements "
        "are drawn; give a model of another class"
    )
