"""A step of a run that many ranks trained is done again by one process, exactly, and any other step is noticed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from metro_megatron.config.schema import Config
from metro_megatron.data.batch import MicroBatch
from metro_megatron.data.masking import Masking
from metro_megatron.data.views import View, corrupt
from metro_megatron.errors import UserError
from metro_megatron.evaluate.token_losses import SampleLosses, page_of, text_of
from metro_megatron.objective.digest import digest, digest_parts
from metro_megatron.train.corpus import Corpus
from metro_megatron.train.replay import Replayed, replay
from tests.distributed import run_ranks
from tests.parity.small_run import small_config, small_corpus
from tests.train.test_trainer import run

LAYOUTS = [
    pytest.param(2, {"tensor_model_parallel_size": 2}, id="tp2"),
    pytest.param(
        8, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, id="tp2pp2dp2", marks=pytest.mark.long
    ),
]


def config_for(folder: Path, parallel: dict[str, Any]) -> Config:
    return small_config(
        model={"hidden_dropout": 0.1, "attention_dropout": 0.1},
        parallel=parallel,
        checkpoint={"save_interval": 2},
        train={"output": str(folder), "train_steps": 6, "log_interval": 2},
    )


def replayed(folder: str, step: int, spoiled: str = "") -> Replayed:
    """In one process: the step again, with a mask elsewhere in it if it shall be spoiled."""
    position = Masking.noise_keys

    def elsewhere(self: Masking, draws: Any, positions: Any) -> Any:
        keys = position(self, draws, positions)
        if len(keys):
            keys[0] ^= 1
        return keys

    with patch.object(Corpus, "open", lambda config: small_corpus(config)):
        if spoiled:
            with patch.object(Masking, "noise_keys", elsewhere):
                return replay(Path(folder), step, torch.device("cpu"), lambda done, last: None)
        return replay(Path(folder), step, torch.device("cpu"), lambda done, last: None)


@pytest.mark.parametrize(("ranks", "parallel"), LAYOUTS)
def test_one_process_does_what_all_ranks_did(tmp_path: Path, ranks: int, parallel: dict[str, Any]) -> None:
    """Step 3 of lines of two steps: from the checkpoint of step 2 to the line of step 4, with dropout."""
    run_ranks(run, ranks, config_for(tmp_path, parallel))
    ((found),) = run_ranks(replayed, 1, str(tmp_path), 3)
    assert found.begin == tmp_path / "iter_0000002" and [line.step for line in found.lines] == [4]
    assert found.lines[0].is_same is True
    assert found.lines[0].differences.keys() == {"aux_loss", "rtd_loss", "clm_loss"}
    assert max(found.lines[0].differences.values()) < 1e-6
    assert [sample.place for sample in found.samples] == list(range(48, 72))
    assert not (tmp_path / "lock").exists() and len(list(tmp_path.glob("iter_*"))) == 3
    for name in ("aux", "clm"):
        for sample in found.samples:
            assert np.array_equal(~np.isnan(sample.losses[name]), sample.is_masked)
    (spoiled,) = run_ranks(replayed, 1, str(tmp_path), 3, "other noise")
    assert spoiled.lines[0].is_same is False


def test_losses_of_tokens_add_up_to_the_line(tmp_path: Path) -> None:
    """A run that logs every step: sums of the page over counts are its figures; a damaged checkpoint is gone behind."""
    config = config_for(tmp_path, {})
    config = small_config(
        model={},
        checkpoint={"save_interval": 2, "keep_last": 0},
        train={"output": str(tmp_path), "train_steps": 6, "log_interval": 1},
    )
    run_ranks(run, 1, config)
    line = [json.loads(one) for one in (tmp_path / "metrics.jsonl").read_text().splitlines()][4]
    (found,) = run_ranks(replayed, 1, str(tmp_path), 5)
    for name in ("aux", "rtd", "clm"):
        losses = np.concatenate([sample.losses[name] for sample in found.samples])
        assert np.nanmean(losses) == pytest.approx(line[f"{name}_loss"], rel=1e-6)
    replaced = sum(int((sample.read != sample.originals).sum()) for sample in found.samples)
    assert replaced / sum(len(sample.read) for sample in found.samples) == pytest.approx(line["replace_rate"])
    next((tmp_path / "iter_0000004").glob("*.distcp")).write_bytes(b"")
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step" 5}\n\xff}\n{"step": 5')  # damaged, and cut short by a crash
    (again,) = run_ranks(replayed, 1, str(tmp_path), 5)
    assert again.begin == tmp_path / "iter_0000002" and "has 0 bytes" in again.remarks[0]
    assert [one.is_same for one in again.lines] == [True] * 3
    for one, other in zip(found.samples, again.samples, strict=True):
        assert all(np.array_equal(one.losses[name], other.losses[name], equal_nan=True) for name in one.losses)
    shutil.rmtree(tmp_path / "iter_0000002"), shutil.rmtree(tmp_path / "iter_0000004")
    (whole,) = run_ranks(replayed, 1, str(tmp_path), 5)
    assert whole.begin is None and [one.step for one in whole.lines] == [1, 2, 3, 4, 5]
    with pytest.raises(UserError, match="must be 1 to train.train_steps 6"):
        replay(tmp_path, 7, torch.device("cpu"), print)


def view_of(ids: list[int], keys: torch.Tensor, order: list[int]) -> View:
    """A view of one row whose masks are all positions, in an order."""
    tokens = torch.tensor(ids)[order][None]
    micro_batch = MicroBatch(
        tokens=torch.zeros_like(tokens),
        masked_tokens=tokens,
        position_ids=tokens,
        is_real=tokens > 0,
        masked_index=torch.arange(len(order)),
        noise_keys=keys[order],
        sample_lengths=torch.tensor([len(order)]),
        sample_ids=torch.tensor([0]),
        is_packed=True,
        max_seqlen=len(order),
        num_samples=1,
    )
    return corrupt(micro_batch, tokens[0])


def test_a_digest_has_no_order_and_notices_every_id() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 1 << 17, (50,), generator=generator).tolist()
    keys = torch.randint(-(2**31), 2**31, (50, 2), generator=generator, dtype=torch.int32)
    whole = digest_parts(view_of(ids, keys, list(range(50))))
    assert torch.equal(whole, digest_parts(view_of(ids, keys, list(range(50))[::-1])))
    halves = [digest_parts(view_of(ids, keys, part)) for part in (list(range(20)), list(range(20, 50)))]
    assert torch.equal(whole, halves[0] + halves[1])
    seen = {digest(whole)}
    for i in range(50):
        seen.add(digest(digest_parts(view_of([*ids[:i], ids[i] + 1, *ids[i + 1 :]], keys, list(range(50))))))
    seen.add(digest(digest_parts(view_of([ids[1], ids[0], *ids[2:]], keys, list(range(50))))))
    assert len(seen) == 52, "each changed id, and two that changed places"


class Letters:
    """Ids as letters."""

    def __getitem__(self, token: int) -> str:
        return f"<{token}>" if token < 5 else chr(92 + token)


def test_the_page_shows_every_token_and_escapes_text() -> None:
    nan = float("nan")
    sample = SampleLosses(
        7,
        np.array([0, 5, 6, 7, 2]),
        np.array([0, 5, 9, 7, 2]),
        np.array([False, False, True, True, False]),
        {"rtd": np.array([0.1, 0.2, 3.0, 0.4, 0.5]), "clm": np.array([nan, nan, 2.0, 1.0, nan])},
    )
    page = page_of([sample], Letters(), {"rtd": 50.0, "clm": 1.0}, "Step <3>", ["a & b"])  # type: ignore[arg-type]
    assert "Step &lt;3&gt;" in page and "a &amp; b" in page and page.count('<span class="token') == 5 + 2
    assert '<span class="token replaced" style="background: rgba(230, 150, 30, 0.750)"' in page
    assert 'title="position 2, id 9: rtd 3.0000, clm 2.0000">e<span class="original">b</span>' in page
    assert page.count("token kept") == 2, "a mask that got its original back, and the legend"
    assert list(text_of(sample, Letters())) == [  # type: ignore[arg-type]
        "sample 7: 5 tokens, rtd 0.8400, clm 1.5000",
        "     2  'b' -> 'e'  rtd 3.0000, clm 2.0000",
        "     3  'c' -> 'c'  rtd 0.4000, clm 1.0000",
    ]
