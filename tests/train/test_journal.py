"""RUN/journal.jsonl keeps what came before and after a line that a crash has cut short."""

from pathlib import Path

from metro_megatron.train.journal import JOURNAL, note, note_rollback, rolled_back, told_between, values_before


def test_a_line_that_a_crash_has_cut_short_takes_no_other_with_it(tmp_path: Path) -> None:
    said: list[str] = []
    note_rollback(tmp_path, range(7, 9), "bad", said.append)
    with (tmp_path / JOURNAL).open("ab") as file:
        file.write(b'{"date": "2026-01')
    note_rollback(tmp_path, range(9, 12), "bad", said.append)
    note_rollback(tmp_path, range(9, 15), "bad", said.append)
    assert rolled_back(tmp_path) == [range(7, 9), range(9, 12), range(9, 15)] and said == []


def test_what_a_run_was_told_in_a_past_that_it_has_gone_back_from_does_not_count(tmp_path: Path) -> None:
    note(tmp_path, 3, {"optimizer.lr": (1, 2), "train.train_steps": (9, 12)}, print)
    note(tmp_path, 9, {"optimizer.lr": (2, 3)}, print)
    note(tmp_path, 6, {"optimizer.lr": (2, 4)}, print)
    note(tmp_path, 8, {"optimizer.lr": (4, 5)}, print)
    assert values_before(tmp_path, 3, 20) == {"optimizer.lr": 1, "train.train_steps": 9}
    assert values_before(tmp_path, 4, 20) == values_before(tmp_path, 6, 7) == {"optimizer.lr": 2}
    assert values_before(tmp_path, 7, 20) == {"optimizer.lr": 4} and values_before(tmp_path, 9, 20) == {}
    assert told_between(tmp_path, 6, 20) == ["optimizer.lr"] and told_between(tmp_path, 8, 20) == []
