"""Resuming is exact, layouts can change in between, and nothing damages a checkpoint that is complete."""

import errno
import json
import os
import shutil
from contextlib import nullcontext
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor, serialization
from torch.distributed.checkpoint.filesystem import FileSystem

from metro_megatron.checkpoint import trial, writing
from metro_megatron.checkpoint.files import TRACKER, tracked_step, write_integrity
from metro_megatron.checkpoint.pieces import files_of
from metro_megatron.checkpoint.publish import retire
from metro_megatron.checkpoint.read import StoredModel
from metro_megatron.config.schema import CheckpointConfig, Config, ParallelConfig
from metro_megatron.errors import UserError
from metro_megatron.parallel.layout import Layout
from tests.checkpoint.tensors import read_model_tensors
from tests.distributed import run_ranks
from tests.parity.small_run import (
    STEPS,
    Record,
    run_steps,
    small_config,
    start,
    use_small_buckets,
    whole_weights,
)

HALF = STEPS // 2
MUON = {
    "matrices": "muon",
    "auxiliary_matrices": "muon",
    "auxiliary_lr": 2e-3,
    "auxiliary_adam_beta2": 0.9,
    "auxiliary_lr_schedule": "0.2 -> 1 at 100%",
}
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}


def config_for(output: Path, tp: int = 1, pp: int = 1, **model: Any) -> Config:
    parallel = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    return small_config(parallel=parallel, train={"output": str(output)}, model=model)


def straight_run(config: Config) -> Record:
    """On every rank: all steps, with a checkpoint in the middle."""
    use_small_buckets()
    trainer = start(config)
    figures, norms = run_steps(trainer, 0, HALF)
    trainer.progress.done = HALF
    trainer.save(None)
    more_figures, more_norms = run_steps(trainer, HALF, STEPS)
    trainer.homes.fetch_parameters()
    record = Record(figures + more_figures, norms + more_norms, whole_weights(trainer))
    trainer.close()
    return record


def resumed_run(config: Config, copy: Path | None = None) -> Record:
    """On every rank: the second half from the checkpoint; first saved again to `copy` if asked for."""
    use_small_buckets()
    trainer = start(config)
    with torch.no_grad():  # whatever was there before must not matter
        for _, module in trainer.pair.modules():
            for parameter in module.parameters():
                parameter.add_(0.5)
    trainer.restore()
    assert trainer.progress.done == HALF
    if copy:
        trainer.checkpoints.run = copy
        trainer.save(None)
    figures, norms = run_steps(trainer, HALF, STEPS)
    trainer.homes.fetch_parameters()
    record = Record(figures, norms, whole_weights(trainer))
    trainer.close()
    return record


@pytest.mark.parametrize(
    ("world_size", "tp", "pp", "tokens", "optimizer"),
    [
        (1, 1, 1, 1024, {}),
        (2, 1, 1, 0, MUON),
        pytest.param(4, 2, 2, 0, {}, marks=pytest.mark.long),
        pytest.param(4, 2, 2, 0, MUON, marks=pytest.mark.long),
    ],
)
def test_resumed_run_equals_straight_run_bit_for_bit(
    tmp_path: Path, world_size: int, tp: int, pp: int, tokens: int, optimizer: dict[str, Any]
) -> None:
    """With dropout on, by batches of tokens and of samples, one optimizer and several: losses, norms and weights."""
    config = config_for(tmp_path, tp, pp, **DROPOUT)
    config = replace(config, optimizer=replace(config.optimizer, **optimizer))
    if tokens:
        config = replace(config, train=replace(config.train, global_batch_size=0, global_batch_tokens=tokens))
    straight = run_ranks(straight_run, world_size, config)[0]
    resumed = run_ranks(resumed_run, world_size, config)[0]
    assert resumed.figures == straight.figures[HALF:]
    assert resumed.grad_norms == straight.grad_norms[HALF:]
    assert resumed.weights.keys() == straight.weights.keys()
    for name, weight in straight.weights.items():
        assert torch.equal(resumed.weights[name], weight), name


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, read in this process's own single rank."""
    layout = Layout.create(ParallelConfig(), torch.device("cpu"))
    entries = dist_checkpointing.load_plain_tensors(str(folder))
    layout.destroy()
    return {name: entry for name, entry in entries.items() if isinstance(entry, torch.Tensor)}


def equal_tensors(first: Path, second: Path) -> tuple[list[str], list[str]]:
    """(all names, names of tensors that differ) of two checkpoints."""
    one, two = all_tensors(first), all_tensors(second)
    assert one.keys() == two.keys()
    return sorted(one), [name for name in one if not torch.equal(one[name], two[name])]


@pytest.mark.parametrize("optimizer", [{}, pytest.param(MUON, marks=pytest.mark.long)], ids=["adam", "muon"])
def test_checkpoint_loads_under_another_layout(tmp_path: Path, optimizer: dict[str, Any]) -> None:
    """(tp, pp, dp) = (2, 2, 1) to (1, 1, 2): weights, masters and moments are equal; so are two more steps.

    Of a model that has what METRO has not: TUPE's term, last norms, a bias that both homes' heads share.
    """
    model = {"untied_positions": True, "norm_first": True, "shared_lm_bias": True}
    run, copy = tmp_path / "run", tmp_path / "copy"
    run.mkdir()
    copy.mkdir()
    spread, other = (
        replace(config, optimizer=replace(config.optimizer, **optimizer))
        for config in (config_for(run, tp=2, pp=2, **model), config_for(run, **model))
    )
    straight = run_ranks(straight_run, 4, spread)[0]
    resumed = run_ranks(resumed_run, 2, other, copy)[0]
    names, different = run_ranks(equal_tensors, 1, *(one / f"iter_{HALF:07d}" for one in (run, copy)))[0]
    assert different == []
    kinds = {name.split(".")[2] if name.startswith("optimizer.state") else "model" for name in names}
    assert {"model", "exp_avg", "exp_avg_sq", "param"} <= kinds
    assert {"tied.decoder.bias", "tied.main_table.untied.query.weight", "main.block.final_layernorm.bias"} <= set(names)
    for key in ("aux_loss", "rtd_loss", "clm_loss"):
        expected = [figures[key] for figures in straight.figures[HALF:]]
        np.testing.assert_allclose([figures[key] for figures in resumed.figures], expected, rtol=1e-6)
    np.testing.assert_allclose(
        [total for total, _, _ in resumed.grad_norms],
        [total for total, _, _ in straight.grad_norms[HALF:]],
        rtol=1e-6,
    )


def pass_on(config: Config, copy: Path) -> None:
    """On every rank: load, and save as another layout's."""
    trainer = start(config)
    trainer.restore()
    trainer.checkpoints.run = copy
    trainer.save(None)
    trainer.close()


@pytest.mark.long
def test_a_checkpoint_goes_round_all_layouts_and_comes_back_as_it_was(saved: Path, tmp_path: Path) -> None:
    """(tp, pp, vpp, dp), each loaded from the one before: every tensor, moments too, bit for bit."""
    runs = [saved]
    for tp, pp, vpp, dp in [(2, 1, 1, 2), (1, 2, 2, 2), (4, 1, 1, 1), (1, 4, 1, 1), (2, 2, 2, 1), (1, 1, 1, 1)]:
        sizes = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
        sizes |= {"virtual_pipeline_model_parallel_size": vpp}
        runs.append(tmp_path / f"{tp}_{pp}_{vpp}_{dp}")
        runs[-1].mkdir()
        config = small_config(parallel=sizes, train={"output": str(runs[-2])})
        run_ranks(pass_on, tp * pp * dp, config, runs[-1])
    last, first = (one / f"iter_{HALF:07d}" for one in (runs[-1], saved))
    _, different = run_ranks(equal_tensors, 1, first, last)[0]
    assert different == []


def encoder_by_megatron_core(folder: Path, shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    """On every rank of two: its half of the matrices' rows, loaded by a call that knows nothing of us."""
    layout = Layout.create(ParallelConfig(), torch.device("cpu"))
    state: dict[str, Any] = {}
    for name, (first, *others) in shapes.items():
        half = torch.empty(first // 2, *others)
        place = (0, layout.rank, 2)
        state[name] = ShardedTensor.from_rank_offsets(name, half, place, replica_id=0)
    loaded = dist_checkpointing.load(state, str(folder))
    layout.destroy()
    return dict(loaded)


def test_megatron_core_s_own_load_reads_a_part_of_the_weights(saved: Path) -> None:
    """The matrices of main's layers alone, cut as the reader likes."""
    folder = saved / f"iter_{HALF:07d}"
    weights = {
        name: tensor
        for name, tensor in read_model_tensors(folder).items()
        if name.startswith("main.block.layers") and tensor.dim() == 2
    }
    assert len(weights) == 16
    halves = run_ranks(encoder_by_megatron_core, 2, folder, {name: tensor.shape for name, tensor in weights.items()})
    for name, tensor in weights.items():
        assert torch.cat([half[name] for half in halves]).equal(tensor), name


def test_main_is_read_where_neither_the_auxiliary_nor_the_optimizer_is_there(saved: Path, tmp_path: Path) -> None:
    """By files that are not there, nothing of which can be read: of five, main's and the shared tensors' are left."""
    whole = read_model_tensors(saved / f"iter_{HALF:07d}")
    folder = shutil.copytree(saved / f"iter_{HALF:07d}", tmp_path / "part")
    names = [name for name in whole if not name.startswith("aux.")]
    needed = files_of(StoredModel.open(folder).metadata, names)
    for file in folder.glob("*.distcp"):
        if file.name not in needed:
            file.unlink()
    assert len(list(folder.glob("*.distcp"))) == len(needed) == 2
    part = StoredModel.open(folder).read(names)
    assert all(part[name].equal(whole[name]) for name in names)
    with pytest.raises(UserError, match=r"\.distcp: missing"):
        StoredModel.open(folder).read([name for name in whole if name.startswith("aux.")])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(straight_run, 1, config_for(folder))
    return folder


def restore_problem(config: Config) -> list[str]:
    """On every rank: what restoring complains about."""
    trainer = start(config)
    try:
        trainer.restore()
    except UserError as error:
        return error.problems
    finally:
        trainer.close()
    return []


def test_checkpoint_of_another_model_or_run_is_refused(saved: Path) -> None:
    config = config_for(saved, hidden_dropout=0.2)
    config = replace(config, train=replace(config.train, seed=9))
    for problems in run_ranks(restore_problem, 2, config):
        text = "\n".join(problems)
        assert "model.hidden_dropout is 0.2, but the checkpoint was made with 0.0" in text
        assert "train.seed is 9, but the checkpoint was made with 1" in text
        assert "choose another train.output" in text


def test_other_shards_are_refused(saved: Path, tmp_path: Path) -> None:
    run = shutil.copytree(saved, tmp_path / "run")
    folder = run / f"iter_{HALF:07d}"
    progress = json.loads((folder / "progress.json").read_text())
    (folder / "progress.json").write_text(json.dumps({**progress, "data": ["other"]}))
    write_integrity(folder)
    assert "not those that" in run_ranks(restore_problem, 1, config_for(run))[0][0]


def flip(path: Path) -> None:
    """One bit."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damaged_checkpoint_is_refused_by_name(saved: Path, tmp_path: Path, damage: str) -> None:
    run = shutil.copytree(saved, tmp_path / "run")
    victim = next((run / f"iter_{HALF:07d}").glob("*.distcp"))
    if damage == "flip":
        flip(victim)
    elif damage == "cut":
        os.truncate(victim, victim.stat().st_size - 1)
    else:
        victim.unlink()
    problems = run_ranks(restore_problem, 1, config_for(run))[0]
    assert str(victim) in "\n".join(problems)


def go_back(config: Config) -> tuple[int, list[str], list[str]]:
    """On every rank: (steps restored, what is said, what is said of the next save)."""
    trainer = start(config)
    trainer.restore()
    done, trainer.progress.done = trainer.progress.done, trainer.progress.done + 1
    saved = trainer.checkpoints.save(trainer.progress.done, {"step": trainer.progress.done})
    trainer.close()
    return done, trainer.remarks, saved.remarks if os.environ["RANK"] == "0" else []


@pytest.mark.parametrize("tracker", ["", "77", f"{HALF + 9}"])
def test_a_damaged_newest_checkpoint_and_a_lost_tracker_are_said_and_gone_back_from(
    saved: Path, tmp_path: Path, tracker: str
) -> None:
    """What lies ahead is set aside, so that retention keeps what is new; of old ones that are links, the links go.

    A bit that was flipped is found while it is loaded, and nothing of that stays: fingerprints are compared.
    """
    run, elsewhere = shutil.copytree(saved, tmp_path / "run"), tmp_path / "elsewhere"
    ahead, old = run / f"iter_{HALF + 9:07d}", run / "iter_0000000"
    shutil.copytree(run / f"iter_{HALF:07d}", ahead)
    shutil.copytree(run / f"iter_{HALF:07d}", elsewhere)
    old.symlink_to(elsewhere)
    victim = next(ahead.glob("*.distcp"))
    flip(victim)
    (run / TRACKER).write_text(tracker)
    config = replace(config_for(run), checkpoint=CheckpointConfig(keep_last=1))
    strict = replace(config, checkpoint=CheckpointConfig(strict=True))
    problems = run_ranks(restore_problem, 2, strict)
    assert all(one[0].startswith(str(run / TRACKER if tracker in ("", "77") else victim)) for one in problems)
    for rank, (done, said, later) in enumerate(run_ranks(go_back, 2, config)):
        assert done == HALF
        assert (f"{run / TRACKER} is lost" in said[0]) == (tracker in ("", "77"))
        assert any(one.startswith(f"{victim}: damaged, its contents are not") for one in said)
        assert "going back to an older" in said[-1]
        assert len(later) == (rank == 0)
    assert sorted(path.name for path in run.glob("iter_*")) == [f"iter_{HALF + 1:07d}", f"{ahead.name}.set_aside"]
    assert tracked_step(run) == HALF + 1 and (elsewhere / "integrity.json").is_file()


def unshared_problem(config: Config) -> list[str]:
    """On every rank: what is wrong where each rank has a folder of its own."""
    own = replace(config, train=replace(config.train, output=f"{config.train.output}/{os.environ['RANK']}"))
    trainer = start(own)
    try:
        with patch.object(trial, "SECONDS_TO_APPEAR", 0.2):
            trainer.checkpoints.check_folder()
    except UserError as error:
        return error.problems
    finally:
        trainer.close()
    return []


def test_ranks_that_do_not_share_the_run_folder_end_before_the_first_step(tmp_path: Path) -> None:
    for own in run_ranks(unshared_problem, 2, config_for(tmp_path)):
        assert len(own) == 1 and f"{tmp_path}/1, rank 1 on " in own[0] and "does not see" in own[0]
    assert not list(tmp_path.glob("*/.save_trial*")), "or the same command would be refused"


def test_a_checkpoint_without_files_that_ranks_have_written_is_not_published(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved / f"iter_{HALF:07d}", tmp_path / "folder")
    with pytest.raises(UserError, match="one folder for all machines"):
        write_integrity(folder, {"__1_0.distcp": {"bytes": 1, "sha256": ""}})
    next(folder.glob("*.distcp")).unlink()
    with pytest.raises(UserError, match="1 of 5 files"):
        write_integrity(folder)


def save_many(config: Config) -> list[str]:
    """On every rank: five checkpoints of which two are kept, then saves that fail in several ways."""
    trainer = start(config)
    trainer.run.mkdir(exist_ok=True)
    for step in range(1, 6):
        run_steps(trainer, step - 1, step)
        trainer.progress.done = step
        trainer.save(None)
    problems = []
    real_usage, real_plan = shutil.disk_usage, writing.Planner.plan

    def fail_to_save(planner: object, state: object, folder: Path) -> None:
        Path(folder, "half.distcp").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    def no_space(path: object) -> Any:
        return real_usage(path)._replace(free=1000)

    for broken in ({"disk_usage": no_space}, {"plan": fail_to_save}):
        shutil.disk_usage = broken.get("disk_usage", real_usage)  # type: ignore[assignment]
        writing.Planner.plan = broken.get("plan", real_plan)  # type: ignore[assignment]
        trainer.progress.done = 6
        try:
            trainer.save(None)
        except UserError as error:
            problems.append("\n".join(error.problems))
    shutil.disk_usage, writing.Planner.plan = real_usage, real_plan  # type: ignore[method-assign]
    trainer.restore()
    assert trainer.progress.done == 5
    trainer.close()
    return problems


def test_retention_and_failed_saves_keep_what_is_complete(tmp_path: Path) -> None:
    config = small_config(train={"output": str(tmp_path)}, checkpoint={"keep_last": 2})
    for no_room, failed in run_ranks(save_many, 2, config):
        assert "a checkpoint needs about" in no_room and "free some space" in no_room
        assert "iter_0000006 could not be written" in failed and "No space left" in failed
    complete = sorted(path.name for path in tmp_path.glob("iter_*") if not path.name.endswith(".unfinished"))
    assert complete == ["iter_0000004", "iter_0000005"]
    assert tracked_step(tmp_path) == 5


def test_run_folder_without_checkpoint_starts_from_scratch(tmp_path: Path) -> None:
    assert tracked_step(tmp_path) is None


def save_without_room(config: Config, where: str) -> tuple[str, str]:
    """On every rank: a save of which a shard, or what the first rank writes by itself, finds no room; and the next."""
    trainer = start(config)
    trainer.run.mkdir(exist_ok=True)
    run_steps(trainer, 0, 1)
    problem = OSError(28, "No space left on device")
    owner, name = {
        "shard": (writing, "write_piece"),
        "common": (torch, "save"),
        "metadata.json": (serialization, "save_config"),
    }[where]
    plain, said = getattr(owner, name), ""

    @wraps(plain)
    def broken(*arguments: Any, **named: Any) -> Any:
        names = [str(getattr(argument, "name", "")) for argument in arguments if where == "shard"]
        of_shard = any("__0_" in name for name in names)
        of_first = where == "metadata.json" or (where == "common" and str(arguments[1]).endswith("common.pt"))
        if of_shard or of_first:
            raise problem
        return plain(*arguments, **named)

    with patch.object(owner, name, broken):
        try:
            trainer.checkpoints.save(1, {"step": 1})
        except UserError as error:
            said = str(error)
    saved = trainer.checkpoints.save(2, {"step": 2})
    trainer.close()
    return said, saved.folder.name


def save_where_one_fails_at_the_folder(config: Config) -> str:
    """On every rank: the folder of a save that the second rank's machine does not see yet."""
    trainer = start(config)
    fails = patch.object(FileSystem, "mkdir", side_effect=OSError(errno.EIO, "Input/output error"))
    with fails if trainer.layout.rank == 1 else nullcontext():
        saved = trainer.checkpoints.save(1, {"step": 1})
    trainer.close()
    return saved.folder.name


def test_the_first_rank_alone_makes_a_checkpoint_s_folder(tmp_path: Path) -> None:
    """Another that failed at it would leave the first one in a collective."""
    assert list(run_ranks(save_where_one_fails_at_the_folder, 2, config_for(tmp_path))) == ["iter_0000001"] * 2


@pytest.mark.parametrize("where", ["shard", "common", "metadata.json"])
def test_no_room_on_one_rank_is_said_by_all_and_the_next_save_counts(tmp_path: Path, where: str) -> None:
    """In megatron-core's own writing: a rank that raises by itself would leave the others in a collective."""
    for said, folder in run_ranks(save_without_room, 2, config_for(tmp_path), where):
        assert "iter_0000001 could not be written" in said and "No space left" in said
        assert folder == "iter_0000002"
    assert tracked_step(tmp_path) == 2


def test_an_old_checkpoint_that_cannot_be_removed_keeps_nothing_else(saved: Path, tmp_path: Path) -> None:
    run = shutil.copytree(saved, tmp_path / "run")
    for step in (0, 1, HALF + 9):
        shutil.copytree(run / f"iter_{HALF:07d}", run / f"iter_{step:07d}")
    remove = shutil.rmtree

    def stubborn(folder: Path, *others: Any, **named: Any) -> None:
        if Path(folder).name == "iter_0000000.unfinished":
            raise OSError(16, "Device or resource busy")
        remove(folder, *others, **named)

    with patch.object(shutil, "rmtree", stubborn):
        remarks = retire(run, HALF, keep_last=1)
    assert sorted(path.name for path in run.glob("iter_*")) == [
        *("iter_0000000.unfinished", f"iter_{HALF:07d}", f"iter_{HALF + 9:07d}.set_aside")
    ]
    assert len(remarks) == 2 and "busy" in remarks[0]
