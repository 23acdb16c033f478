"""The model card tells of the run, to readers and to programs."""

from pathlib import Path

import yaml

from metro_megatron.hf.card import add_evaluation, model_card, pretraining_flops
from tests.hf.pair import MODEL

FACTS = {
    "checkpoint": "iter_0000007",
    "peak learning rate": 1e-3,
    "pretraining": {"step": 7, "seen tokens": 12345, "flops": 1.25e15},
    "data": [
        {"source": "books | films", "documents": 1000, "tokens": 98765},
        {"source": "news", "documents": 2, "tokens": 4},
    ],
    "training curve": [],
}


def test_facts_become_tables_and_the_header_is_for_programs(tmp_path: Path) -> None:
    card = model_card(MODEL, FACTS, ("rtd", "clm"))
    (tmp_path / "README.md").write_text(card)
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["pretraining"] == FACTS["pretraining"] and "license" not in header
    assert pretraining_flops(tmp_path) == 1.25e15
    assert "# license: " in card.split("---\n")[1]
    assert "| checkpoint | iter_0000007 |\n| peak learning rate | 0.001 |\n\n## Pretraining\n" in card
    assert "| step | 7 |\n| seen tokens | 12,345 |\n| flops | 1.25e+15 |\n" in card
    rows = (
        "| source | documents | tokens |\n| --- | --- | --- |\n| books \\| films | 1,000 | 98,765 |\n| news | 2 | 4 |\n"
    )
    assert card.endswith(f"\n## Data\n\n{rows}")


def test_an_evaluation_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    assert not add_evaluation(tmp_path, {"rtd_auc": 0.5})
    card = model_card(MODEL, FACTS, ("rtd", "clm"))
    path.write_text(card)
    assert add_evaluation(tmp_path, {"documents": 1000, "rtd_auc": 0.66183})
    section = "\n## Evaluation\n\n|  |  |\n| --- | --- |\n| documents | 1,000 |\n| rtd_auc | 0.6618 |\n"
    assert path.read_text() == card + section
    notes = "\n## Notes\n\nmine\n\n## More\n\nstill mine\n"
    path.write_text(card + section + notes)
    assert add_evaluation(tmp_path, {"rtd_auc": 0.75})
    assert path.read_text() == card + section.replace("| documents | 1,000 |\n", "").replace("0.6618", "0.75") + notes
