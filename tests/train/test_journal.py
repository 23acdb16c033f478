"""RUN/journal.jsonl keeps what came before and after a line that a crash has cut short."""

from pathlib import Path

from metro_megatron.train.journal import JOURNAL, note_rollback, rolled_back


def test_a_line_that_a_crash_has_cut_short_takes_no_other_with_it(tmp_path: Path) -> None:
    said: list[str] = []
    note_rollback(tmp_path, range(7, 9), "bad", said.append)
    with (tmp_path / JOURNAL).open("ab") as file:
        file.write(b'{"date": "2026-01')
    note_rollback(tmp_path, range(9, 12), "bad", said.append)
    note_rollback(tmp_path, range(9, 15), "bad", said.append)
    assert rolled_back(tmp_path) == [range(7, 9), range(9, 12), range(9, 15)] and said == []
