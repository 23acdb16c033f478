"""tools/compare_runs.py pairs seeds and items, and refuses what cannot be paired."""

import numpy as np
import pytest

from metro_megatron.cli.command_line import call_with_options
from metro_megatron.commands.compare_runs import compare, main, read_arm
from metro_megatron.errors import UserError
from metro_megatron.evaluate.comparison import difference, variance_ratio
from metro_megatron.evaluate.scores import Score, read_scores, write_scores


def write_run(folder, seed, scores, task="cloze"):
    (folder / "pretraining").mkdir(parents=True)
    (folder / "pretraining" / "run_config.yaml").write_text(f"train:\n  seed: {seed}\n")
    write_scores(folder / "scores" / "tasks.jsonl", (Score(task, f"i{k}", float(v)) for k, v in enumerate(scores)))
    return str(folder)


def test_arms_are_paired_by_seed_and_item_and_their_order_is_none(tmp_path, capsys):
    random = np.random.default_rng(0)
    common, a, b = random.standard_normal((3, 4, 30))
    a, b = common + 0.1 * a + 1, common + 0.1 * b
    of_a = [write_run(tmp_path / f"a{seed}", seed, a[seed]) for seed in (2, 0, 3, 1)]
    of_b = [write_run(tmp_path / f"b{seed}", seed, b[seed]) for seed in (0, 1, 2, 3)]
    (found,) = compare(read_arm(of_a), read_arm(of_b))
    assert found.found == difference(a - b) and found.ratio == variance_ratio(a, b) < 0.1
    (same,) = compare(read_arm(of_a), read_arm(of_a))
    assert (same.found.mean, same.found.half_width) == (0, 0) and "no difference in any score" in str(same)
    (apart,) = compare(read_arm(of_a[:2]), read_arm(of_b[1:2] + of_b[3:]))  # seeds 2, 0 against 1, 3
    assert apart.found == difference(a[[0, 2]], -b[[1, 3]]) and np.isnan(apart.ratio)
    assert call_with_options(main, ["--a", *of_a, "--b", *of_b[:3]]) is None
    printed = capsys.readouterr().out
    assert "paired by seeds 0, 1, 2; B lacks 3\n" in printed and "A is higher" in printed
    (one,) = compare(read_arm(of_a[:1]), read_arm(of_b[2:3]))
    assert one.found == (a[2] - b[2]).mean() and "one seed has no interval" in str(one)


@pytest.mark.parametrize(
    ("of_a", "of_b", "remedy"),
    [
        ((1, 2), (2, 3), "run seed 3 of A or seed 1 of B as well"),
        ((1, 2, 4), (2, 3), "run seed 3 of A or seed 1, 4 of B as well, or leave 2 out of --a: unpaired"),
        ((2,), (1, 2, 3), "run seed 1, 3 of A as well"),
    ],
)
def test_one_pair_says_which_seeds_would_make_another(tmp_path, capsys, of_a, of_b, remedy):
    arms = [
        [write_run(tmp_path / f"{arm}{seed}", seed, [0, 1]) for seed in own] for arm, own in (("a", of_a), ("b", of_b))
    ]
    call_with_options(main, ["--a", *arms[0], "--b", *arms[1]])
    assert f"one pair has no interval: {remedy}\n" in capsys.readouterr().out


def test_items_that_some_run_lacks_are_left_out_and_counted(tmp_path):
    a = read_arm([write_run(tmp_path / "a1", 1, [1, 2, 3]), write_run(tmp_path / "a2", 2, [1, 2])])
    (found,) = compare(a, a)
    assert (found.num_items, found.num_left_out) == (2, 1)


def test_what_cannot_be_compared_is_refused(tmp_path):
    first, again = write_run(tmp_path / "a", 1, [1, 2]), write_run(tmp_path / "b", 1, [1, 2], task="pairs")
    with pytest.raises(UserError, match="second run of seed 1"):
        read_arm([first, again])
    with pytest.raises(UserError, match="no task that all runs"):
        list(compare(read_arm([first]), read_arm([again])))
    with pytest.raises(UserError, match=r"no \*\.jsonl in scores/"):
        read_arm([str(tmp_path)])
    config = tmp_path / "a" / "pretraining" / "run_config.yaml"
    for content in (b"nonsense: 1", b": : [", b"", b"train:", b"train: {seed: x}", b"train: {seed: true}", b"\xff"):
        config.write_bytes(content)
        with pytest.raises(UserError, match=r"run_config.yaml: has no readable train.seed"):
            read_arm([first])
    for line, message in (
        ("{}", "line 1"),
        ('{"task": "a", "id": 1, "score": NaN}', "is no score"),
        ('{"task": "a", "id": "1", "score": 1}\n{"task": "a", "id": 1, "score": 1}', "second score"),
    ):
        (tmp_path / "x.jsonl").write_text(line)
        with pytest.raises(UserError, match=message):
            read_scores(tmp_path / "x.jsonl")


def test_ids_may_hold_the_ends_of_lines_that_json_has_not(tmp_path):
    scores = [Score("a", "1\u2028\u0085", 1.0), Score("a", "2", 0.0)]
    write_scores(tmp_path / "x.jsonl", scores)
    assert read_scores(tmp_path / "x.jsonl") == {"a": {"1\u2028\u0085": 1.0, "2": 0.0}}
