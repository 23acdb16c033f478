"""`pretrain_metro.py --dry_run` as it is typed."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from metro_megatron.config.file import parse_config
from metro_megatron.rehearsal.documents import Documents
from metro_megatron.rehearsal.report import _named
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
    assert "not rehearsed: Transformer Engine's layers" in result.stdout
    assert "as long as Wikipedia's are assumed to be" in result.stdout
    assert Image.open(picture).size[0] > 1000


def test_every_kind_of_stage_is_said_with_its_memory_by_component(tmp_path: Path) -> None:
    """The second holds most, and is neither the first, nor the one of the middle, nor the last."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    layout = ("--model.num_layers", 6, "--parallel.pipeline_model_parallel_size", 4)
    layout += ("--parallel.pipeline_model_parallel_layout", "Et|ttt|t|tL", "--parallel.transformer_impl", "local")
    result = run_program(SCRIPT, "--dry_run", "--config", tmp_path / "tiny.yaml", *layout, "--world_size", 4)
    assert result.returncode == 0, result.stderr
    assert "Transformer Engine" not in result.stdout
    lines = [line.split("  ") for line in result.stdout.splitlines()]
    rows = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    head = next(row for row in rows if row[:1] == ["parameters"])
    assert head[3:] == [f"on stage {stage}" for stage in range(4)]
    layers = [int(number.replace(",", "")) for row in rows if row[:2] == ["main layers", "stage"] for number in row[2:]]
    assert layers[2] == 3 * layers[1] and layers[0] == 6 * layers[1] == sum(layers[1:])
    for stage in range(4):
        of_stage = [row[1:] for row in rows if row[:1] == [f"stage {stage}"]]
        (total,) = [row[1:] for row in of_stage if row[0] == "all"]
        parts = [[float(cell) for cell in row[2:]] for row in of_stage if row[0] != "all"]
        assert {row[0] for row in of_stage} >= {"embeddings", "auxiliary", "main layers", "all"}
        assert [sum(column) for column in zip(*parts, strict=True)] == pytest.approx([*map(float, total)], abs=0.004)


@pytest.mark.parametrize(
    ("stages", "name"),
    [([0], "stage 0"), ([0, 1, 2, 5], "stages 0-2, 5"), ([1, 2], "stages 1-2"), ([0, 2], "stages 0, 2")],
)
def test_stages_that_are_alike_are_named_together(stages: list[int], name: str) -> None:
    assert _named(stages) == name


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


def test_options_of_a_rehearsal_are_told_where_there_is_none() -> None:
    result = run_program(SCRIPT, "--world_size=8", "--picture", "step.png")
    assert result.returncode == 2
    assert result.stderr == "error: --world_size, --picture: of a rehearsal; give --dry_run, too, or leave it out\n"


@pytest.mark.parametrize(("world_size", "is_full"), [(512, True), (4096, False)])
def test_a_batch_that_cannot_fill_the_ranks_is_warned_of(world_size: int, is_full: bool) -> None:
    """XXL: 2,048 samples on 128 data-parallel ranks, and on 1,024."""
    config = parse_config(["--config", "xxl"])
    advice = Documents.assumed(config).advice(world_size // 4)
    assert advice is None if is_full else advice is not None and "padding" in advice, advice
