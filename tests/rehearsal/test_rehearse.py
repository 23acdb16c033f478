"""`pretrain_metro.py --dry_run` as it is typed."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from metro_megatron.config.file import parse_config
from metro_megatron.errors import UserError
from metro_megatron.rehearsal.documents import Documents
from metro_megatron.rehearsal.picture import refuse_picture
from tests.distributed import run_program

SCRIPT = Path(__file__).parents[2] / "pretrain_metro.py"
TINY = """
model: {hidden_size: 64, num_attention_heads: 2, ffn_hidden_size: 128, num_layers: 2, auxiliary_num_layers: 1,
        vocab_size: 300, max_position_embeddings: 64, relative_attention_num_buckets: 16,
        relative_attention_max_distance: 32}
data: {seq_length: 64, micro_batch_tokens: 256}
parallel: {pipeline_model_parallel_size: 2}
train: {global_batch_size: 32, precision: fp16}
"""


def test_a_run_without_data_or_gpus(tmp_path: Path) -> None:
    """Eight ranks, of which four are traced."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    picture = tmp_path / "step.png"
    gpu_only = ("--parallel.transformer_impl", "transformer_engine", "--optimizer.adam_impl", "apex")
    options = ("--config", tmp_path / "tiny.yaml", "--world_size", 8, "--picture", picture, *gpu_only)
    result = run_program(SCRIPT, "--dry_run", *options)
    assert result.returncode == 0, result.stderr
    assert "rehearsed 8 ranks in 7 groups by 4 of them" in result.stdout
    assert "all make the same calls in the same order" in result.stdout
    assert "not rehearsed: making groups, looks at the run folder, loading, the self-check, writing" in result.stdout
    assert "as long as Wikipedia's are assumed to be" in result.stdout
    assert Image.open(picture).size[0] > 1000


def test_what_cannot_be_rehearsed_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    options = ("--config", tmp_path / "tiny.yaml", "--world_size", 10, "--corruption.source", "unigram")
    result = run_program(SCRIPT, "--dry_run", *options, "--model.num_layers", 1)
    assert result.returncode == 2 and result.stdout == ""
    problems = result.stderr.splitlines()
    assert [problem.partition(" is ")[0] for problem in problems] == [
        "error: model.num_layers",
        "error: --world_size",
        "error: corruption.source",
    ]


def test_a_picture_that_cannot_be_drawn_is_refused_before_the_rehearsal() -> None:
    refuse_picture(Path("step.PNG"))
    with pytest.raises(UserError, match="its ending is none of a picture"):
        refuse_picture(Path("step.mp4"))


@pytest.mark.parametrize(("world_size", "is_full"), [(512, True), (4096, False)])
def test_a_batch_that_cannot_fill_the_ranks_is_warned_of(world_size: int, is_full: bool) -> None:
    """XXL: 2,048 samples on 128 data-parallel ranks, and on 1,024."""
    config = parse_config(["--config", "xxl"])
    advice = Documents.assumed(config).advice(world_size // 4)
    assert advice is None if is_full else advice is not None and "padding" in advice, advice
