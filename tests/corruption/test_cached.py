"""Cached replacements are those of the online run, token by token; a cache of another run is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from metro_megatron.commands.cache_corruption import Options, main
from metro_megatron.config.schema import Config
from metro_megatron.data.batch import StepBatch
from metro_megatron.data.records import to_json
from metro_megatron.data.replacements import CONTENT, PLAN, CacheFolder
from metro_megatron.data.samples import build_sample_index
from metro_megatron.errors import UserError
from metro_megatron.train.cache import write_cache
from metro_megatron.train.corpus import Corpus
from metro_megatron.train.trainer import Trainer
from tests.corruption.test_frozen import save
from tests.distributed import run_ranks
from tests.parity.small_run import memory_shard, run_steps, samples_of, small_config

STEPS = 5
SPLIT = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
Samples = dict[tuple[str, int, int], list[int]]


def corpus_of(config: Config) -> Corpus:
    """With held-out samples."""
    shards = [memory_shard(seed=7), memory_shard(seed=8, num_documents=20)]
    train, validation = (build_sample_index([shard], config.data.seq_length) for shard in shards)
    return Corpus(config, shards[:1], train, shards[1:], validation)


def config_of(folder: Path, source: str = "frozen", **concerns: dict[str, Any]) -> Config:
    corruption = {
        "source": source,
        "frozen_model": str(folder / "bert"),
        "cache": str(folder / "cache"),
        "temperature_schedule": "exponential",
        "temperature": 3.0,
        "temperature_tau": 0.5,
    }
    train = {"train_steps": STEPS, "eval_interval": 2, "eval_samples": 20, **concerns.pop("train", {})}
    return small_config(corruption={**corruption, **concerns.pop("corruption", {})}, train=train, **concerns)


def write(config: Config, path: Path, steps_per_part: int = 2) -> Any:
    return write_cache(corpus_of(config), torch.device("cpu"), path, steps_per_part)


def corrupted(configs: list[Config]) -> list[Samples]:
    """On every rank: the corrupted ids of all steps and of an evaluation, by step and sample."""
    found = []
    for config in configs:
        corpus = corpus_of(config)
        if config.corruption.source == "cached":
            corpus = corpus.with_cache(Path(config.corruption.cache), "")
        trainer = Trainer(config, corpus, torch.device("cpu"))
        seen: Samples = {}
        phase = trainer.step.read

        def remember(views: Any, batch: StepBatch, metrics: Any, seen: Samples = seen, phase: Any = phase) -> None:
            name = "train" if torch.is_grad_enabled() else "validation"
            seen.update(
                ((name, batch.step, sample), ids)
                for view in views
                for sample, ids in samples_of(view.tokens, view.micro_batch)
            )
            phase(views, batch, metrics)

        trainer.step.read = remember  # type: ignore[method-assign]
        run_steps(trainer, 0, STEPS)
        trainer.evaluate()
        trainer.close()
        found.append(seen)
    return found


def merged(ranks: list[list[Samples]], number: int) -> Samples:
    """Of all ranks, which must agree where they hold the same samples."""
    whole: Samples = {}
    for rank in ranks:
        for key, ids in rank[number].items():
            assert whole.setdefault(key, ids) == ids, key
    return whole


def test_a_cache_is_the_online_run_token_by_token_in_every_layout(tmp_path: Path) -> None:
    save("bert", tmp_path / "bert")
    online, cached = config_of(tmp_path), config_of(tmp_path, "cached")
    written = run_ranks(write, 1, online, tmp_path / "cache")[0]
    assert (written.steps, written.samples, written.validation_samples) == (STEPS, STEPS * 24, 20)
    one = run_ranks(corrupted, 1, [online, cached])
    assert len(merged(one, 0)) == STEPS * 24 + 20
    split = [replace(config, parallel=replace(config.parallel, **SPLIT)) for config in (online, cached)]
    four = run_ranks(corrupted, 4, split)
    assert merged(one, 0) == merged(one, 1) == merged(four, 0) == merged(four, 1)


@pytest.mark.long
def test_two_processes_write_the_cache_of_batches_in_tokens(tmp_path: Path) -> None:
    save("bert", tmp_path / "bert")
    tokens = {"train": {"global_batch_size": 0, "global_batch_tokens": 512}}
    configs = [config_of(tmp_path, source, **tokens) for source in ("frozen", "cached")]
    run_ranks(write, 2, configs[0], tmp_path / "cache")
    one = run_ranks(corrupted, 1, configs)
    assert merged(one, 0) == merged(one, 1)


def names(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}


def interrupted(config: Config, path: Path, after: int) -> str:
    """Die, as from kill -9, before the file number `after` gets its name; then complete the cache."""
    import metro_megatron.files as files

    class Killed(BaseException):
        pass

    plain, count = files.os.replace, 0

    def dying(source: Any, target: Any) -> None:
        nonlocal count
        count += 1
        if count > after:
            raise Killed
        plain(source, target)

    files.os.replace = dying
    try:
        write(config, path)
    except Killed:
        pass
    finally:
        files.os.replace = plain
    has_content = (path / CONTENT).exists()
    (path / f"train_00000.ids.npy.1{files._PARTIAL}").write_bytes(b"left behind")
    write(config, path)
    return f"{has_content} {count}"


def interrupt_everywhere(config: Config, folder: Path) -> list[dict[str, bytes]]:
    found = []
    for after in (1, 2, 5):
        path = folder / f"interrupted{after}"
        assert interrupted(config, path, after).startswith("False")
        found.append(names(path))
    return found


def test_an_interrupted_cache_is_completed(tmp_path: Path) -> None:
    save("bert", tmp_path / "bert")
    config = config_of(tmp_path)
    run_ranks(write, 1, config, tmp_path / "whole")
    whole = names(tmp_path / "whole")
    assert sorted(whole) == sorted(
        [PLAN, CONTENT]
        + [
            f"{part}.{kind}"
            for part in ("train_00000", "train_00001", "train_00002", "validation_00000")
            for kind in ("ids.npy", "counts.npy", "json")
        ]
    )
    for again in run_ranks(interrupt_everywhere, 1, config, tmp_path)[0]:
        assert again == whole
    damaged = {"train_00000.ids.npy": 200, "train_00001.counts.npy": 130, "validation_00000.json": 60}
    for name, byte in damaged.items():
        path = tmp_path / "whole" / name
        path.write_bytes(whole[name][:byte] + bytes([whole[name][byte] ^ 1]) + whole[name][byte + 1 :])
    assert len(list(CacheFolder(tmp_path / "whole").problems())) == len(damaged)
    run_ranks(write, 1, config, tmp_path / "whole")
    assert names(tmp_path / "whole") == whole, "damaged parts are drawn again"


def test_a_cache_of_another_run_is_refused_with_every_difference(tmp_path: Path) -> None:
    save("bert", tmp_path / "bert")
    config = config_of(tmp_path)
    run_ranks(write, 1, config, tmp_path / "cache")
    sha256 = json.loads((tmp_path / "cache" / PLAN).read_text())["frozen_model"]
    assert corpus_of(config).with_cache(tmp_path / "cache", sha256).cache is not None
    fewer = config_of(tmp_path, train={"eval_samples": 7})
    assert corpus_of(fewer).with_cache(tmp_path / "cache", "").cache is not None
    other = config_of(
        tmp_path,
        train={"seed": 9, "train_steps": 7, "global_batch_size": 12, "precision": "bf16", "eval_samples": 25},
        objective={"mask_probability": 0.2},
        corruption={"temperature": 2.0, "disallow_correct": True},
        data={"weights": [1.0]},
    )
    corpus = corpus_of(other)
    corpus = replace(corpus, train_shards=[replace(corpus.train_shards[0], sha256="else", tokenizer_sha256="else")])
    with pytest.raises(UserError) as error:
        corpus.with_cache(tmp_path / "cache", "another")
    text = "\n".join(error.value.problems)
    for part in (
        "seed is 9, in the cache 1",
        "train steps is 7, in the cache 5",
        "batch is 12 samples, in the cache 24 samples",
        "precision is bf16, in the cache fp32",
        "validation samples is 25, in the cache 20",
        "masking is 0.2, 0.0, 0.0, in the cache 0.15",
        "temperature is 2 -> 1 as exp(-u / 0.5), in the cache 3 ->",
        "disallow correct is True",
        "weights is [1.0]",
        "shards is [else], in the cache [memory]",
        "tokenizer is else, in the cache memory",
        "frozen model is another, in the cache",
        "write one with tools/cache_corruption.py",
    ):
        assert part in text, part
    folder, plan = CacheFolder(tmp_path / "cache"), CacheFolder(tmp_path / "cache").plan()
    assert plan is not None
    (folder.path / PLAN).write_bytes(to_json(plan))
    with pytest.raises(UserError, match="plan.json: damaged .*has no checksum.* remove .* write it again"):
        corpus_of(config).with_cache(tmp_path / "cache", "")
    folder.write(PLAN, replace(plan, sampler_version=0))
    with pytest.raises(UserError, match="sampler version is 1, in the cache 0"):
        corpus_of(config).with_cache(tmp_path / "cache", "")
    (tmp_path / "cache" / CONTENT).unlink()
    with pytest.raises(UserError, match="no finished cache.*continues an unfinished one"):
        corpus_of(config).with_cache(tmp_path / "cache", "")


def test_a_reader_refuses_what_the_cache_does_not_hold(tmp_path: Path) -> None:
    folder = CacheFolder(tmp_path)
    folder.write_part("train", 0, np.array([7, 8, 9]), np.array([1, 0, 2]), 1 << 16)
    folder.write_part("train", 1, np.array([5, 6]), np.array([2]), 1 << 16)
    folder.write(CONTENT, {"train": [0, 3, 4], "validation": [0]})
    reader = folder.reader("train")
    assert reader.read(np.array([3, 0, 1, 2]), np.array([2, 1, 0, 2])).tolist() == [5, 6, 7, 8, 9]
    with pytest.raises(UserError, match="sample 2 has another number of masked tokens"):
        reader.read(np.array([2]), np.array([1]))
    with pytest.raises(UserError, match="ends at sample 4, sample 4 is needed"):
        reader.read(np.array([4]), np.array([1]))
    folder.write(CONTENT, {"train": [0, 3, 5], "validation": [0]})
    with pytest.raises(UserError, match="train_00001.json: has 1 samples, cache.json says 2; give its command again"):
        folder.reader("train")
    folder.write(CONTENT, {"train": [0, 3, 4], "validation": [0]})
    ids, _ = folder.files("train", 1)
    whole = ids.read_bytes()
    for content in (whole[:-1], b""):
        ids.write_bytes(content)
        with pytest.raises(UserError, match=f"{ids.name}: {len(content)} bytes, not {len(whole)}: damaged or missing"):
            folder.reader("train")
    ids.write_bytes(whole[:-1] + b"\x08")
    with pytest.raises(UserError, match=f"{ids.name}: SHA-256 .* when written: damaged; give its command again"):
        folder.reader("train").read(np.array([3]), np.array([2]))
    ids.unlink()
    with pytest.raises(UserError, match=f"{ids.name}: 0 bytes, not {len(whole)}: damaged or missing; give its command"):
        folder.reader("train")
    shutil.rmtree(tmp_path)


def test_a_run_in_phases_is_not_cached() -> None:
    with pytest.raises(UserError, match="train.phases are given; caches are of runs without phases"):
        main(Options(), ["--config", "demo", "--corruption.source", "frozen", "--train.phases", "{start: 90%}"])


def trained(config: Config) -> int:
    trainer = Trainer(config, corpus_of(config).with_cache(Path(config.corruption.cache), ""), torch.device("cpu"))
    with patch("metro_megatron.train.trainer.copy_tokenizer"):
        trainer.train()
    trainer.close()
    return trainer.progress.done


def test_the_last_step_needs_nothing_behind_the_cache(tmp_path: Path) -> None:
    save("bert", tmp_path / "bert")
    online, cached = (config_of(tmp_path, source, train={"train_steps": 1}) for source in ("frozen", "cached"))
    run_ranks(write, 1, online, tmp_path / "cache")
    run = replace(cached, train=replace(cached.train, output=str(tmp_path / "run")))
    assert run.train.self_check and run_ranks(trained, 1, run) == [1]
