import base64
import json
import os
from html.parser import HTMLParser

import pytest

from tools.demo.summary import INTRINSIC, Options, collect, covered, main, read_spans, table, verdict

PROMISED = {
    "aux_loss",
    "unigram_loss",
    "clm_loss",
    "rtd_auc",
    "replace_rate",
    "replace_accuracy",
    "pretrained_accuracy",
    "random_init_accuracy",
    "tfidf_accuracy",
    "tasks",
    "tokens_seen",
    "tokens_per_second",
    "seconds",
}


SENTIMENT = {
    "pretrained": [0.65, 0.64, 0.66],
    "random_init": [0.61, 0.62, 0.6],
    "tfidf": 0.7,
    "chance": 0.51,
    "num_train": 1000,
    "num_test": 1500,
}
CLOZE = SENTIMENT | {"pretrained": [0.5, 0.51, 0.52], "random_init": [0.25, 0.24, 0.26], "chance": 0.25, "num_test": 99}
CANDIDATE = {"token": "<b>", "probability": 0.25}
EXAMPLES = {
    "legend": "what [...] means",
    "sentences": [
        {
            "original": "He & she say <b>.",
            "masked": "He & she say <mask>.",
            "filled": "He & she say [a].",
            "corrected": None,
            "masks": [
                {"token": "<b>", "guesses": [CANDIDATE], "probability": 0.25, "frequent": CANDIDATE, "frequency": 0.125}
            ],
        }
    ],
}

SPANS = (
    ("texts", "text/counts.json", 1000, 1005),
    ("pretraining", "pretraining.done", 1005, 1405),
    ("evaluation", "evaluation.json", 1405, 1425),
    ("tasks", "sentiment.json", 1415, 1435),
)
"""Stage, file, begin and end; two of them overlap."""


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.fixture
def results(tmp_path, monkeypatch):
    """The files of all stages, as they leave them."""
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "run"
    figures = dict.fromkeys(INTRINSIC, 0.25) | {"aux_loss": 5.25, "unigram_loss": 6.625, "rtd_auc": 0.75}
    write(root / "evaluation.json", figures | {"examples": EXAMPLES})
    write(root / "text" / "counts.json", {"overlaps": 63})
    write(root / "acceptability" / "baseline.json", {"tfidf": 0.77, "chance": 0.5, "num_train": 600, "num_test": 150})
    write(root / "sentiment.json", SENTIMENT)
    write(root / "cloze.json", CLOZE)
    (root / "curves.png").write_bytes(b"a picture")
    recipe = {"epochs": 2, "learning_rate": 0.0005, "batch_size": 32}
    for start, base in (("pretrained", 0.7), ("random", 0.71)):
        for seed in (1, 2, 3):
            accuracy = {"accuracy": base + seed / 100, "recipe": recipe}
            write(root / "acceptability" / f"{start}-{seed}" / "metrics.json", accuracy)
    lines = [
        {"step": 10, "consumed_tokens": 1000, "tokens_per_second": 100.0, "aux_loss": 8.0},
        {"step": 10, "validation/aux_loss": 8.1},
        {"step": 20, "consumed_tokens": 3000, "tokens_per_second": 50.0, "aux_loss": 7.0},
    ]
    (root / "pretraining").mkdir()
    (root / "pretraining" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / "pretraining.done").touch()
    begun = []
    for stage, file, begin, end in SPANS:
        os.utime(root / file, (end, end))
        begun.append(f"{begin} {stage} run/{file}\n")
    (root / "begun.txt").write_text("".join(begun))
    return root


def test_summary_has_what_is_promised(results, capsys):
    main(Options("run"))
    summary = json.loads((results / "summary.json").read_text())
    assert set(summary) >= PROMISED
    assert summary == collect(results)
    assert summary["pretrained_accuracy"] == pytest.approx([0.71, 0.72, 0.73])
    assert summary["random_init_accuracy"] == pytest.approx([0.72, 0.73, 0.74])
    assert (summary["tokens_seen"], summary["steps"], summary["seconds"]) == (3000, 20, 435.0)
    assert summary["tokens_per_second"] == pytest.approx(3000 / (10 + 40))
    assert summary["overlaps_removed"] == 63
    printed = capsys.readouterr().out
    assert summary["tasks"] == {
        "acceptability": {
            "pretrained": pytest.approx([0.71, 0.72, 0.73]),
            "random_init": pytest.approx([0.72, 0.73, 0.74]),
            "tfidf": 0.77,
            "chance": 0.5,
            "num_train": 600,
            "num_test": 150,
        },
        "cloze": CLOZE,
        "sentiment": SENTIMENT,
    }
    assert "Acceptability: at this budget pretraining does not help" in printed
    assert "Cloze: pretraining helped" in printed and "51.0 (50.0, 51.0, 52.0)" in (results / "demo.html").read_text()
    assert "Sentiment: pretraining helped" in printed and "1.38 below, at least 1.00 below: goal reached" in printed
    assert "72.0" in printed and "71.0 72.0 73.0" in printed and "77.0" in printed
    assert "make learn" in printed and "run/demo.html" in printed


def test_the_page_holds_all_it_shows(results):
    main(Options("run"))
    page = (results / "demo.html").read_text()
    parser = Texts()
    parser.feed(page)
    assert parser.open == [] and not parser.links
    for text in (
        "He & she say <b>.",
        "<b> 25.0%",
        "12.5%",
        "72.0 (71.0, 72.0, 73.0)",
        "65.0 (65.0, 64.0, 66.0)",
        "77.0",
    ):
        assert any(text in one for one in parser.texts), text
    assert parser.pictures == ["data:image/png;base64," + base64.b64encode(b"a picture").decode()]


class Texts(HTMLParser):
    """What a browser would show of a page, and whether its elements are closed."""

    def __init__(self):
        super().__init__()
        self.open, self.texts, self.links, self.pictures = [], [], [], []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img"):
            self.open.append(tag)
        found = dict(attributes)
        self.links += [found[name] for name in ("href", "srcset") if name in found]
        if "src" in found:
            self.pictures.append(found["src"])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.texts.append(text)


def test_seconds_of_stages(results):
    assert collect(results)["stage_seconds"] == {
        "texts": 5.0,
        "pretraining": 400.0,
        "evaluation": 20.0,
        "tasks": 20.0,
    }


def test_a_later_beginning_counts_and_a_target_that_is_not_there_does_not(results):
    with (results / "begun.txt").open("a") as file:
        file.write("1003 texts run/text/counts.json\n1440 summary summary\n")
    spans = read_spans(results / "begun.txt")
    assert spans["texts"] == [(1003.0, 1005.0)] and "summary" not in spans


def test_a_resumed_run_counts_the_steps_of_all_attempts(results):
    with (results / "begun.txt").open("a") as file:
        file.write("1395 pretraining run/pretraining.done\n")  # the steps took 50 seconds
    summary = collect(results)
    assert summary["stage_seconds"]["pretraining"] == pytest.approx(50.0)
    assert summary["seconds"] == pytest.approx(435.0 - 400.0 + 50.0)


def test_covered():
    assert covered([(5, 7), (0, 2), (1, 3), (1.5, 2.5)]) == 5.0
    assert covered([]) == 0.0


def test_a_missed_goal_is_said(results):
    summary = collect(results) | {"aux_loss": 6.0, "rtd_auc": 0.59}
    assert table(summary).count("goal MISSED") == 2


@pytest.mark.parametrize(
    ("pretrained", "random", "expected"),
    [
        ([0.80, 0.81, 0.79], [0.70, 0.72, 0.78], "pretraining helped"),
        ([0.80, 0.81, 0.78], [0.70, 0.72, 0.78], "overlap"),
        ([0.70, 0.71, 0.72], [0.73, 0.75, 0.74], "worse than every one"),
    ],
)
def test_the_verdict_claims_no_more_than_the_seeds_show(pretrained, random, expected):
    assert expected in verdict(pretrained, random)
    assert ("pretraining helped" in verdict(pretrained, random)) == (min(pretrained) > max(random))
