"""Tiny files in the layouts in which GLUE, SuperGLUE and SQuAD are downloaded, good for training and for scoring."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Unbalanced quotes, as GLUE has them: its files are not CSV.
SENTENCES = ('the "old cat sees a dog', "a good bird likes the river", "the bad cat finds", "a green house, 'the dog\"")


def write_glue(root: Path) -> Path:
    """All nine tasks and AX; every train and dev file has four rows."""
    a, b = SENTENCES, SENTENCES[::-1]
    number = [str(i) for i in range(4)]
    nli, binary = ["entailment", "neutral", "contradiction", "entailment"], ["0", "1", "1", "0"]
    two = ["entailment", "not_entailment", "not_entailment", "entailment"]
    for split in ("train", "dev"):
        _tsv(root / "CoLA" / f"{split}.tsv", None, ["gj04"] * 4, binary, ["", "*", "*", ""], a)
        _tsv(root / "SST-2" / f"{split}.tsv", "sentence label", a, binary)
        _tsv(
            root / "QQP" / f"{split}.tsv", "id qid1 qid2 question1 question2 is_duplicate", *[number] * 3, a, b, binary
        )
        _tsv(root / "QNLI" / f"{split}.tsv", "index question sentence label", number, a, b, two)
        _tsv(root / "RTE" / f"{split}.tsv", "index sentence1 sentence2 label", number, a, b, two)
        _tsv(root / "WNLI" / f"{split}.tsv", "index sentence1 sentence2 label", number, a, b, binary)
        mrpc = ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"]
        _tsv(root / "MRPC" / f"{split}.tsv", mrpc, binary, number, number, a, b, encoding="utf-8-sig")
        stsb = "index genre filename year old_index source1 source2 sentence1 sentence2 score"
        _tsv(root / "STS-B" / f"{split}.tsv", stsb, number, *[["none"] * 4] * 6, a, b, ["5.000", "0.250", "3.8", "1"])
    parses = "sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse"
    mnli = f"index promptID pairID genre {parses} sentence1 sentence2"
    filler = [["( a ( b ) )"] * 4] * 4
    _tsv(root / "MNLI" / "train.tsv", f"{mnli} label1 gold_label", *[number] * 4, *filler, a, b, nli, nli)
    for name in ("matched", "mismatched"):
        dev = f"{mnli} label1 label2 label3 label4 label5 gold_label"
        _tsv(root / "MNLI" / f"dev_{name}.tsv", dev, *[number] * 4, *filler, a, b, *[nli[::-1]] * 5, nli)
        _tsv(root / "MNLI" / f"test_{name}.tsv", mnli, *[number] * 4, *filler, a, b)
    _tsv(root / "CoLA" / "test.tsv", "index sentence", number, a)
    _tsv(root / "SST-2" / "test.tsv", "index sentence", number, a)
    _tsv(root / "STS-B" / "test.tsv", stsb.removesuffix(" score"), number, *[["none"] * 4] * 6, a, b)
    _tsv(root / "QQP" / "test.tsv", "id question1 question2", number, a, b)
    _tsv(root / "MRPC" / "test.tsv", ["index", *mrpc[1:]], number, number, number, a, b, encoding="utf-8-sig")
    _tsv(root / "QNLI" / "test.tsv", "index question sentence", number, a, b)
    for name in ("RTE", "WNLI", "diagnostic"):
        _tsv(
            root / name / ("diagnostic.tsv" if name == "diagnostic" else "test.tsv"),
            "index sentence1 sentence2",
            number,
            a,
            b,
        )
    return root


def write_superglue(root: Path) -> Path:
    """All eight tasks, AX-b and AX-g; every train and val file has two rows or more."""
    pairs = [{"premise": SENTENCES[i], "hypothesis": SENTENCES[i - 1], "idx": i} for i in range(2)]
    two = [{"label": "entailment"}, {"label": "not_entailment"}]
    boolean = [{"label": True}, {"label": False}]
    boolq = [{"question": "is the cat old", "passage": SENTENCES[i], "idx": i} for i in range(2)]
    copa = [
        {"premise": "The cat was bad.", "choice1": "It sees.", "choice2": "It likes.", "question": asks, "idx": i}
        for i, asks in enumerate(("cause", "effect"))
    ]
    wic = [
        {"word": "old", "sentence1": "the old cat", "sentence2": "an old house", "idx": i, "start1": 4, "end1": 7}
        for i in range(2)
    ]
    target = {"span1_index": 0, "span1_text": "The cat", "span2_index": 6, "span2_text": "it"}
    wsc = [{"text": "The cat sees the dog and it, finds.", "target": target, "idx": i} for i in range(2)]
    for folder, lines, labels in (
        ("RTE", pairs, two),
        (
            "CB",
            [*pairs, {**pairs[0], "idx": 2}],
            [{"label": name} for name in ("contradiction", "entailment", "neutral")],
        ),
        ("BoolQ", boolq, boolean),
        ("COPA", copa, [{"label": 0}, {"label": 1}]),
        ("WiC", wic, boolean),
        ("WSC", wsc, boolean),
    ):
        _jsonl(root / folder / "test.jsonl", lines)
        for split in ("train", "val"):
            _jsonl(
                root / folder / f"{split}.jsonl", [{**line, **label} for line, label in zip(lines, labels, strict=True)]
            )
    for split in ("train", "val", "test"):
        is_labelled = split != "test"
        _jsonl(root / "MultiRC" / f"{split}.jsonl", [_multirc(0, is_labelled), _multirc(1, is_labelled)])
        _jsonl(root / "ReCoRD" / f"{split}.jsonl", [_record(is_labelled)])
    ax_b = {"sentence1": SENTENCES[0], "sentence2": SENTENCES[1], "logic": "Negation"}
    _jsonl(root / "AX-b" / "AX-b.jsonl", [{**ax_b, "idx": i, **two[i]} for i in range(2)])
    ax_g = [{**pairs[i % 2], "idx": i, "pair_id": f"pair{i // 2}", **two[i // 2]} for i in range(4)]
    _jsonl(root / "AX-g" / "AX-g.jsonl", ax_g)
    return root


def write_squad(root: Path) -> Path:
    """Both versions; of 2.0 the second question has no answer."""
    context = "The old cat sees a dog. A bird likes the river."
    qas: list[dict[str, Any]] = [
        {"id": "q0", "question": "Who sees a dog?", "answers": [{"text": "old cat", "answer_start": 4}]},
        {"id": "q1", "question": "What does a bird like?", "answers": [{"text": "the river", "answer_start": 37}]},
    ]
    impossible = {"is_impossible": True, "answers": [], "plausible_answers": [{"text": "A bird", "answer_start": 24}]}
    for version, questions in (("1.1", qas), ("2.0", [{**qas[0], "is_impossible": False}, {**qas[1], **impossible}])):
        for split in ("train", "dev"):
            if split == "dev":
                golds = [*questions[0]["answers"], {"text": "The old cat", "answer_start": 0}]
                questions = [{**questions[0], "answers": golds}, questions[1]]
            data = {
                "version": version,
                "data": [{"title": "a", "paragraphs": [{"context": context, "qas": questions}]}],
            }
            path = root / f"{split}-v{version}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(data))
    return root


def write_nli(root: Path) -> Path:
    """SNLI, with a pair that has no gold label, and the three rounds of ANLI."""
    names = ["entailment", "neutral", "contradiction", "-"]
    snli = [
        {"gold_label": name, "sentence1": SENTENCES[i], "sentence2": SENTENCES[i - 1], "pairID": f"p{i}"}
        for i, name in enumerate(names)
    ]
    for split in ("train", "dev", "test"):
        _jsonl(root / "snli_1.0" / f"snli_1.0_{split}.jsonl", snli)
        for number in range(1, 4):
            line = {
                "uid": f"u{number}",
                "context": SENTENCES[number],
                "hypothesis": "a cat",
                "label": "enc"[number - 1],
            }
            _jsonl(root / "anli_v1.0" / f"R{number}" / f"{split}.jsonl", [line])
    return root


def _tsv(path: Path, header: str | Sequence[str] | None, *columns: Sequence[str], encoding: str = "utf-8") -> None:
    names = [header.split() if isinstance(header, str) else header] if header else []
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["\t".join(fields) + "\n" for fields in (*names, *zip(*columns, strict=True))]
    path.write_text("".join(lines), encoding=encoding)


def _jsonl(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _multirc(idx: int, is_labelled: bool) -> dict[str, Any]:
    answers = [{"text": text, "idx": i, **({"label": i % 2} if is_labelled else {})} for i, text in enumerate("abc")]
    questions = [
        {"question": f"Which {number}?", "idx": number, "answers": answers[: 3 - number]} for number in range(2)
    ]
    return {"idx": idx, "version": 1.1, "passage": {"text": SENTENCES[idx], "questions": questions}}


def _record(is_labelled: bool) -> dict[str, Any]:
    text = "Anna met Bob in Rome.\n@highlight\nBob likes Rome"
    entities = [{"start": 0, "end": 3}, {"start": 9, "end": 11}, {"start": 16, "end": 19}, {"start": 33, "end": 35}]
    queries = []
    for idx, (query, gold) in enumerate((("@placeholder saw Bob", "Anna"), ("she went to @placeholder", "Rome"))):
        begin = text.index(gold)
        answers = [{"start": begin, "end": begin + len(gold) - 1, "text": gold}]
        queries.append({"query": query, "idx": idx, **({"answers": answers} if is_labelled else {})})
    return {"source": "x", "idx": 0, "passage": {"text": text, "entities": entities}, "qas": queries}
