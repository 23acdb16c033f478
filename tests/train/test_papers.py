"""Every row of METRO's Table 2, and ELECTRA, made small: trained, converted, compared with the trainer, evaluated."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from metro_megatron.checkpoint.save import Checkpoints
from metro_megatron.commands.convert_checkpoint import Options, main
from metro_megatron.commands.evaluate import load_pair
from metro_megatron.config.file import parse_config
from metro_megatron.evaluate.intrinsic import evaluate, held_out_text
from metro_megatron.tokenizer.tokenizer import Tokenizer
from tests.distributed import run_ranks
from tests.hf.pair import write_tokenizer
from tests.parity.small_run import VOCAB_SIZE, Figures, run_steps, start

EXAMPLES = Path(__file__).parents[2] / "examples"
BASELINE = ["base", str(EXAMPLES / "ablations" / "baseline.yaml")]
ROWS = {path.stem: [*BASELINE, str(path)] for path in sorted((EXAMPLES / "ablations").glob("*.yaml"))}
ELECTRA = {name: [name] for name in ("electra_small", "electra_base")}
SMALL = {
    "model": {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "ffn_hidden_size": 64,
        "num_layers": 2,
        "auxiliary_num_layers": 1,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 48,
    },
    "data": {"train": "memory", "seq_length": 48, "micro_batch_tokens": 128, "validation_fraction": 0},
    "optimizer": {"lr": 1e-3, "lr_warmup_steps": 2},
    "train": {"train_steps": 6, "global_batch_size": 24, "precision": "fp32", "device": "cpu"},
}
NARROW = {"model": {"auxiliary_hidden_size": 16, "auxiliary_num_attention_heads": 2, "auxiliary_ffn_hidden_size": 32}}
STEPS = 3


def from_training_to_evaluation(
    runs: dict[str, list[str]], folder: Path
) -> dict[str, tuple[Figures, dict[str, float]]]:
    """On a lone rank: figures of the last of STEPS steps, and of the exported model on a few sentences."""
    tokenizer = write_tokenizer(folder / "tokenizer")
    found = {}
    for name, files in runs.items():
        run, export = folder / name, folder / f"{name}_hf"
        run.mkdir()
        sections = [SMALL, NARROW] if name in ELECTRA else [SMALL]
        options = [
            f"--{section}.{option}={value}"
            for changes in sections
            for section, values in changes.items()
            for option, value in values.items()
        ]
        config = parse_config(["--config", *files, *options, "--train.output", str(run)])
        trainer = start(config)
        try:
            figures, _ = run_steps(trainer, 0, STEPS)
            trainer.homes.fetch_parameters()
            Checkpoints(config, trainer.layout, trainer.pair, trainer.optimizer).save(STEPS, {})
        finally:
            trainer.close()
        (run / "tokenizer").symlink_to(tokenizer)
        main(Options(load=str(run), output=str(export)))
        text = held_out_text([["the old cat sees a green bird."] * 9] * 4, Tokenizer.from_folder(tokenizer))
        counts = np.ones(VOCAB_SIZE, dtype=np.int64)
        found[name] = figures[-1], evaluate(load_pair(export), text, counts, 4, 1, lambda done, total: None)
    return found


@pytest.mark.long
def test_every_row_of_table_2_and_electra(tmp_path: Path) -> None:
    """main refuses an export whose outputs are not the trainer's."""
    runs = {**ROWS, **ELECTRA}
    (found,) = run_ranks(from_training_to_evaluation, 1, runs, tmp_path, timeout=600)
    assert found.keys() == runs.keys() and len(found) == 16
    for name, (trained, evaluated) in found.items():
        losses = {figure for figure in trained if figure.endswith("_loss")} - {"scl_loss"}
        assert losses <= evaluated.keys(), name
        assert all(np.isfinite([*trained.values(), *evaluated.values()])), name
    assert "rtd_loss" not in found["replace_mlm"][0] and "clm_loss" not in found["electra_small"][0]
    assert found["one_choice_cloze"][1]["cloze_loss"] < 2 and found["rtd_scl"][0]["scl_loss"] > 0
