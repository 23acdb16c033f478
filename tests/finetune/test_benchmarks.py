"""What is made of the benchmarks' own files: texts, labels, ids and sets, by hand."""

import shutil
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from metro_megatron.errors import UserError
from metro_megatron.finetune.examples import LabelledTexts
from metro_megatron.finetune.questions import Question
from metro_megatron.finetune.source import Source
from metro_megatron.finetune.task import Task
from metro_megatron.finetune.tasks import BenchmarkName, GlueName, NliName, SquadName, SuperGlueName, benchmark
from metro_megatron.finetune.tasks.grouped import CATEGORIES
from metro_megatron.finetune.tasks.multiple_choice import Choice
from metro_megatron.finetune.tasks.ranking import Query
from tests.finetune.layouts import SENTENCES, write_glue, write_nli, write_squad, write_superglue

IDS = ["0", "1", "2", "3"]
A, B = list(SENTENCES), list(SENTENCES[::-1])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("benchmarks")
    write_glue(root / "glue")
    write_superglue(root / "superglue")
    write_squad(root / "squad")
    write_nli(root / "nli")
    return root


def read(data: Path, name: Any) -> Task[Any]:
    folder = next(f for f, names in FOLDERS.items() if name in get_args(names))
    return Source(data=str(data / folder)).read(name)


FOLDERS = {"glue": GlueName, "superglue": SuperGlueName, "squad": SquadName, "nli": NliName}
BINARY = ["0", "1", "1", "0"]
NLI = ["entailment", "neutral", "contradiction", "entailment"]
ENCODED = [{"label": sorted(set(NLI)).index(one)} for one in NLI]
TWO = ["entailment", "not_entailment", "not_entailment", "entailment"]
GLUE: dict[str, tuple[LabelledTexts, tuple[str, ...]]] = {
    "cola": (LabelledTexts(A, None, BINARY), ("mcc", "accuracy")),
    "sst2": (LabelledTexts(A, None, BINARY), ("accuracy",)),
    "mrpc": (LabelledTexts(A, B, BINARY), ("accuracy", "f1")),
    "stsb": (LabelledTexts(A, B, [5.0, 0.25, 3.8, 1.0], IDS), ("spearman", "pearson")),
    "qqp": (LabelledTexts(A, B, BINARY, IDS), ("accuracy", "f1")),
    "mnli": (LabelledTexts(A, B, NLI, IDS), ("accuracy",)),
    "qnli": (LabelledTexts(A, B, TWO, IDS), ("accuracy",)),
    "rte": (LabelledTexts(A, B, TWO, IDS), ("accuracy",)),
    "wnli": (LabelledTexts(A, B, BINARY, IDS), ("accuracy",)),
    "ax": (LabelledTexts(A, B, NLI, IDS), ("accuracy",)),
}


@pytest.mark.parametrize("name", get_args(GlueName))
def test_glue(data: Path, name: str) -> None:
    examples, scores = GLUE[name]
    task = read(data, name)
    assert (task.train, task.validation) == (examples, examples)
    assert (task.benchmark, task.score_names) == (name, scores)
    task.settings()
    unlabelled = LabelledTexts(A, examples.second, [], IDS)
    if name == "mnli":
        assert task.others.pop("mm").validation == examples
    names = {"mnli": ["test_m", "test_mm", "ax"], "ax": ["ax"]}.get(name, ["test"])
    assert {other: one.validation for other, one in task.others.items()} == dict.fromkeys(names, unlabelled)


SUPERGLUE: dict[str, tuple[LabelledTexts, tuple[str, ...]]] = {
    "boolq": (LabelledTexts(A[:2], ["is the cat old"] * 2, ["true", "false"], [0, 1]), ("accuracy",)),
    "cb": (
        LabelledTexts([A[0], A[1], A[0]], [A[3], A[0], A[3]], ["contradiction", "entailment", "neutral"], [0, 1, 2]),
        ("accuracy", "macro_f1"),
    ),
    "superglue_rte": (LabelledTexts(A[:2], [A[3], A[0]], ["entailment", "not_entailment"], [0, 1]), ("accuracy",)),
    "wic": (LabelledTexts(["old the old cat"] * 2, ["an old house"] * 2, ["true", "false"], [0, 1]), ("accuracy",)),
    "wsc": (
        LabelledTexts(
            ["The cat sees the dog and it, finds."] * 2,
            ["The cat sees the dog and The cat, finds."] * 2,
            ["true", "false"],
            [0, 1],
        ),
        ("accuracy",),
    ),
}


@pytest.mark.parametrize("name", SUPERGLUE)
def test_superglue_pairs(data: Path, name: str) -> None:
    examples, scores = SUPERGLUE[name]
    task = read(data, name)
    assert (task.train, task.validation, task.score_names) == (examples, examples, scores)
    assert task.others["test"].validation == LabelledTexts(examples.first, examples.second, [], examples.ids)


def test_multirc(data: Path) -> None:
    task = read(data, "multirc")
    assert task.train.first == [A[0]] * 5 + [A[1]] * 5
    assert task.train.second == ["Which 0? a", "Which 0? b", "Which 0? c", "Which 1? a", "Which 1? b"] * 2
    assert task.train.labels == ["0", "1", "0", "0", "1"] * 2
    assert task.train.groups == [(p, q) for p in range(2) for q in (0, 0, 0, 1, 1)]
    assert task.train.ids[3] == {"paragraph": 0, "question": 1, "answer": 0}
    rows = [{"label": int(label)} for label in task.validation.labels]
    # Wrong: the first question's last answer. F1 of right ones: 2*4/(5+4); three of four questions whole.
    told = np.array([0, 1, 1, 0, 1] + [0, 1, 0, 0, 1])
    scores = task.scores((np.eye(2)[told],), rows)
    assert (scores["f1a"], scores["exact"]) == (pytest.approx(8 / 9), 3 / 4)
    assert task.score_names == ("f1a", "exact")


def test_copa(data: Path) -> None:
    task = read(data, "copa")
    assert task.train == [
        Choice("The cat was bad.", ("because It sees.", "because It likes."), 0, 0),
        Choice("The cat was bad.", ("so It sees.", "so It likes."), 1, 1),
    ]
    assert [one.label for one in task.others["test"].validation] == [None, None]
    assert task.scores((np.array([[2.0, 1.0], [1.0, -1.0]]),), [{"label": 0}, {"label": 1}]) == {"accuracy": 0.5}


def test_record(data: Path) -> None:
    task = read(data, "record")
    passage = "Anna met Bob in Rome. @highlight Bob likes Rome"
    entities = ("Anna", "Bob", "Rome")
    first = Query(passage, ("Anna saw Bob", "Bob saw Bob", "Rome saw Bob"), 0, 0, entities, ("Anna",))
    assert task.validation[0] == first and task.validation[1].answers == ("Rome",)
    # Each of two wrong entities of two queries, with the right one where the label says.
    assert [one.text for one in task.train] == [passage] * 4
    for one, query in zip(task.train, (0, 0, 1, 1), strict=True):
        right = ("Anna saw Bob", "she went to Rome")[query]
        assert one.choices[one.label] == right and one.choices[1 - one.label] != right
    assert {one.label for one in task.train} == {0, 1}
    scores = np.array([0.1, 0.3, 0.2, 0.0, 0.5, 0.7])[:, None]  # Bob: wrong; Rome: right
    assert task.scores((scores,), []) == {"f1": 0.5, "exact": 0.5}
    (line, _) = task.predictions((scores,), [])
    assert line == {"id": 0, "label": ["Anna"], "prediction": "Bob", "scores": {"Anna": 0.1, "Bob": 0.3, "Rome": 0.2}}
    assert task.others["test"].validation[0].answers is None


def test_diagnostics_of_superglue(data: Path) -> None:
    task = read(data, "superglue_rte")
    assert list(task.others) == ["axb", "axg", "test"]
    ax_b, ax_g = task.others["axb"], task.others["axg"]
    groups = [("logic",)] * 2
    assert ax_b.validation == LabelledTexts([A[0]] * 2, [A[1]] * 2, ["entailment", "not_entailment"], [0, 1], groups)
    assert (ax_b.score_names, ax_g.score_names) == (("mcc", "accuracy", "mcc_logic"), ("accuracy", "gender_parity"))
    assert ax_g.validation.groups == ["pair0", "pair0", "pair1", "pair1"]
    # Labels 0 0 1 1; the first pair is told apart.
    scores = ax_g.scores((np.eye(2)[[0, 1, 1, 1]],), [{"label": label} for label in (0, 0, 1, 1)])
    assert (scores["accuracy"], scores["gender_parity"]) == (0.75, 0.5)
    assert list(read(data, "axb").others) == ["axb"] and list(read(data, "axg").others) == ["axg"]


def test_diagnostics_of_glue_are_scored_where_the_public_labels_are(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data / "glue", tmp_path / "glue")
    names = ["Lexical Semantics", "Predicate-Argument Structure", "Logic", "Knowledge"]
    shown = [
        ["Quantifiers", "", "Negation", ""],
        ["", "", "Negation;Conditionals", ""],
        ["", "Datives", "", ""],
        [""] * 4,
    ]
    lines = [[*names, "Domain", "Premise", "Hypothesis", "Label"]]
    lines += [[*some, "News", a, b, label] for some, a, b, label in zip(shown, A, B, NLI, strict=True)]
    path = tmp_path / "glue" / "diagnostic" / "diagnostic-full.tsv"
    path.write_text("".join("\t".join(line) + "\n" for line in lines))
    for name in ("mnli", "ax"):
        ax = Source(data=str(tmp_path / "glue")).read(name).others["ax"]
        groups = [("lexical_semantics", "logic"), ("logic",), ("predicate_argument_structure",), ()]
        assert ax.validation == LabelledTexts(A, B, NLI, IDS, groups)
        # Of entailment, neutral, contradiction, entailment: the second and the last wrong.
        found = ax.scores((np.eye(3)[[ax.names.index(one) for one in (NLI[0], NLI[0], NLI[2], NLI[1])]],), ENCODED)
        by_hand = {"accuracy": 0.5, "mcc": 0.2, "mcc_lexical_semantics": 0.0, "mcc_logic": 0.0}
        assert {key: found[key] for key in by_hand} == pytest.approx(by_hand)
        assert ax.score_names == ("mcc", "accuracy", *(f"mcc_{one}" for one in CATEGORIES[:3]))
    path.write_text(path.read_text().replace("\tcontradiction\n", "\n"))
    with pytest.raises(UserError, match="diagnostic-full.tsv, line 4: has not as many fields as the header"):
        Source(data=str(tmp_path / "glue")).read("ax")


def test_models_of_wsc_and_rte_answer_what_glue_shares(data: Path, tmp_path: Path) -> None:
    """WNLI asks as WSC whether a text with a candidate for its pronoun follows from the text."""
    for name in ("glue", "superglue"):
        shutil.copytree(data / name, tmp_path, dirs_exist_ok=True)
    rte = Source(data=str(tmp_path)).read("superglue_rte").others
    assert list(rte) == ["axb", "axg", "glue_test", "test"]
    assert rte["glue_test"].validation == LabelledTexts(A, B, [], IDS)
    others = Source(data=str(tmp_path)).read("wsc").others
    assert list(others) == ["wnli", "wnli_test", "test"]
    assert others["wnli"].validation == LabelledTexts(A, B, ["false", "true", "true", "false"], IDS)
    assert others["wnli"].score_names == ("accuracy",)
    assert others["wnli_test"].validation == LabelledTexts(A, B, [], IDS)


def test_squad(data: Path) -> None:
    context = "The old cat sees a dog. A bird likes the river."
    one, two = read(data, "squad"), read(data, "squad2")
    assert one.train[0] == Question("Who sees a dog?", context, (("old cat", 4),), "q0")
    assert one.validation[0].answers == (("old cat", 4), ("The old cat", 0))
    assert one.train[1].answers == (("the river", 37),) and two.train[1].answers == ()
    assert (one.score_names, two.score_names) == (("f1", "exact"), ("f1", "exact", "best_f1", "best_exact"))
    assert not one.withholds and two.withholds


def test_nli(data: Path) -> None:
    snli, anli = read(data, "snli"), read(data, "anli")
    assert snli.train == LabelledTexts(A[:3], [A[3], A[0], A[1]], NLI[:3], ["p0", "p1", "p2"])
    assert snli.others["test"].validation == snli.train
    names = ["entailment", "neutral", "contradiction"]
    assert anli.train == anli.validation == LabelledTexts(A[1:], ["a cat"] * 3, names, ["u1", "u2", "u3"])
    assert anli.others["r2"].validation == LabelledTexts([A[2]], ["a cat"], ["neutral"], ["u2"])
    assert anli.settings() == snli.settings() == read(data, "mnli").settings()


def test_every_name_is_a_benchmarks(data: Path) -> None:
    assert all(benchmark(name) for name in get_args(BenchmarkName))


def test_the_folder_of_the_task_alone_will_do(data: Path) -> None:
    assert Source(data=str(data / "glue" / "MNLI")).read("mnli") == read(data, "mnli")


def test_rows_of_qqp_that_are_cut_or_joined_are_left_out(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(data / "glue" / "QQP", tmp_path / "QQP")
    path = tmp_path / "QQP" / "train.tsv"
    path.write_text(path.read_text() + "7\t7\t7\tcut\n" + "\t".join("87654321") + "\n")
    assert Source(data=str(tmp_path)).read("qqp").train == read(data, "qqp").train
    assert f"{path}: 2 of 6 rows have too many or too few fields: left out" in capsys.readouterr().out


def corrupt(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("name", "file", "old", "new", "message"),
    [
        ("sst2", "glue/SST-2/dev.tsv", "sentence\t", "text\t", "dev.tsv: has no column sentence, but text, label"),
        ("stsb", "glue/STS-B/train.tsv", "3.8", "good", "train.tsv, line 4: label 'good' is not a finite number"),
        ("mrpc", "glue/MRPC/test.tsv", "3\t3\t3", "3", "test.tsv, line 5: has not as many fields as the header"),
        (
            "rte",
            "glue/RTE/dev.tsv",
            "not_entail",
            "Not_entail",
            "dev.tsv, line 3: label is 'Not_entailment', must be one of entailment, not_entailment",
        ),
        ("sst2", "glue/SST-2/train.tsv", "\t1", "\t1.0", "train.tsv, line .: label is '1.0', must be one of 0, 1"),
        ("cb", "superglue/CB/train.jsonl", '"neutral"', '"Neutral"', "train.jsonl, line .: label is 'Neutral'"),
        ("boolq", "superglue/BoolQ/val.jsonl", '"passage"', '"text"', "val.jsonl, line 1: has no passage"),
        ("wsc", "superglue/WSC/val.jsonl", '"span2_index": 6', '"span2_index": 60', "line 1: span2_index is 60"),
        ("copa", "superglue/COPA/train.jsonl", '"label": 1', '"label": 2', "line 2: label 2 is none of 2 choices"),
        ("cb", "superglue/CB/val.jsonl", ', "label": "neutral"', "", "1 of 3 examples have no label"),
        ("copa", "superglue/COPA/val.jsonl", ', "label": 1', "", "COPA/val.jsonl: 1 of 2 examples have no label"),
        ("wic", "superglue/WiC/val.jsonl", '"label"', '"labels"', "WiC/val.jsonl: 2 of 2 examples have no label"),
        ("squad", "squad/dev-v1.1.json", '"answers"', '"golds"', "dev-v1.1.json: 2 of 2 examples have no label"),
        ("multirc", "superglue/MultiRC/train.jsonl", '"questions"', '"asked"', "line 1: has not the form .*questions"),
        (
            "record",
            "superglue/ReCoRD/val.jsonl",
            '"passage": {',
            '"passage": "a", "other": {',
            "form .*AttributeError",
        ),
        (
            "multirc",
            "superglue/MultiRC/val.jsonl",
            '"questions": [',
            '"questions": [], "other": [',
            "holds no examples",
        ),
        (
            "snli",
            "nli/snli_1.0/snli_1.0_dev.jsonl",
            '"gold_label": "',
            '"gold_label": "-", "was": "',
            "snli_1.0_dev.jsonl: holds no examples",
        ),
        ("record", "superglue/ReCoRD/val.jsonl", "to @placeholder", "to ?", "line 1: query has no @placeholder"),
        ("squad", "squad/dev-v1.1.json", '"paragraphs"', '"texts"', "dev-v1.1.json: has not the form .*paragraphs"),
        ("squad", "squad/train-v1.1.json", '"qas": [', '"qas": [[7], ', "train-v1.1.json, question 1: has no question"),
        (
            "squad",
            "squad/dev-v1.1.json",
            '"context": "',
            '"context": 7, "was": "',
            "q0: context is 7, must be a string",
        ),
        (
            "squad2",
            "squad/dev-v2.0.json",
            'impossible": true',
            'impossible": "no"',
            "is_impossible is 'no', must be true",
        ),
        ("squad2", "squad/train-v2.0.json", 'old cat", "an', 'Cat", "an', "question q0: answer 'Cat' is not in its"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(
    data: Path, tmp_path: Path, name: str, file: str, old: str, new: str, message: str
) -> None:
    shutil.copytree(data, tmp_path / "data")
    corrupt(tmp_path / "data" / file, old, new)
    with pytest.raises(UserError, match=message):
        read(tmp_path / "data", name).settings()


def test_files_that_are_not_there_and_options_of_tables_are_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        Source(data=str(tmp_path)).read("ax")
    assert [problem.split(": no such file")[0] for problem in caught.value.problems] == [
        str(tmp_path / name) for name in ("MNLI/train.tsv", "MNLI/dev_matched.tsv", "diagnostic/diagnostic-full.tsv")
    ]
    with pytest.raises(UserError) as caught:
        Source(train_file="a.csv").read("mnli")
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["--data", "--train_file"]
    with pytest.raises(UserError) as caught:
        Source(data="glue").read("classification")
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "--train_file",
        "--validation_file",
        "--data",
    ]
