"""Candidates are ranked as a slow computation ranks them: one row at a time, one token at a time, without padding."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as Backend
from transformers import BertConfig, BertForMaskedLM, ElectraConfig, ElectraForMaskedLM, ElectraForPreTraining
from transformers import PreTrainedTokenizerFast as Tokenizer

from metro_megatron.cli.command_line import call_with_options, exit_code
from metro_megatron.commands.score import describe, main
from metro_megatron.errors import UserError
from metro_megatron.evaluate.prompts import Filled, read_demonstrations, read_prompts
from metro_megatron.evaluate.ranking import open_scorer
from metro_megatron.hf.modeling_metro import (
    MetroForAuxiliaryMaskedLM,
    MetroForMaskedLM,
    MetroForReplacedTokenDetection,
    MetroForSequenceClassification,
)
from metro_megatron.tokenizer.tokenizer import TOKENIZER_FILES
from tests.hf.conftest import export_folder, no_network

__all__ = ["export_folder", "no_network"]

ITEMS = [
    {"candidates": ["the good dog runs.", "the good dog a the."], "label": 0},
    {"template": "the river {candidate} a green bird.", "candidates": ["is", "was bad", "good"], "label": "good"},
    {"text": "a cat", "template": "{text} {candidate}!", "candidates": ["dog <mask>", "éé"]},
    {"text": "the house was", "candidates": ["old", "green green"], "label": 1},
]
TEXTS = [
    ["the good dog runs.", "the good dog a the."],
    ["the river is a green bird.", "the river was bad a green bird.", "the river good a green bird."],
    ["a cat dog <mask>!", "a cat éé!"],
    ["the house was old", "the house was green green"],
]
SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def write(path: Path, items: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def foreign(kind: type, config: object, export_folder: Path, folder: Path) -> Path:
    """A model of transformers, random, with the export's tokenizer."""
    torch.manual_seed(1)
    kind(config).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        (folder / name).write_bytes((export_folder / name).read_bytes())
    return folder


@torch.no_grad()
def slow_score(
    model: torch.nn.Module, tokenizer: Tokenizer, text: str, candidate: str, head: str, sign: float
) -> float:
    """From the token of the candidate's first character to the first one behind it, on single rows."""
    begin = text.index(candidate)
    end = begin + len(candidate)
    encoded = tokenizer(text, split_special_tokens=True)
    ids, total = torch.tensor([encoded["input_ids"]]), 0.0
    starts = [start for start, _ in encoded.encodings[0].offsets]  # 0 of specials, and no token has the space between
    behind = next((i for i, start in enumerate(starts) if start >= end), ids.size(1) - 1)
    for position in range(encoded.char_to_token(begin), behind):
        read = ids.clone()
        if head == "mlm":
            read[0, position] = tokenizer.mask_token_id
        logits = model.eval()(input_ids=read).logits[0, position]
        if head == "rtd":
            total += torch.sigmoid(sign * logits).log().item()
        else:
            total += logits.softmax(-1)[ids[0, position]].log().item()
    return total


def check(folder: Path, models: dict[str, tuple[torch.nn.Module, float]], path: Path) -> None:
    scorer, tokenizer, prompts = open_scorer(folder), Tokenizer.from_pretrained(folder), read_prompts(path)
    assert [head.name for head in scorer.heads] == list(models)
    for head in scorer.heads:
        found = scorer.scores(head, prompts, 3, average=False)
        for item, texts, scores in zip(ITEMS, TEXTS, found, strict=True):
            expected = [
                slow_score(models[head.name][0], tokenizer, text, candidate, head.name, models[head.name][1])
                for text, candidate in zip(texts, item["candidates"], strict=True)
            ]
            # Rows of a batch are padded, which changes the order of sums in FP32.
            assert scores == pytest.approx(expected, abs=2e-4)


def test_heads_of_an_export_equal_the_slow_computation(export_folder: Path, tmp_path: Path) -> None:
    kinds = {"clm": MetroForMaskedLM, "rtd": MetroForReplacedTokenDetection, "mlm": MetroForAuxiliaryMaskedLM}
    models = {name: (kind.from_pretrained(export_folder), 1.0) for name, kind in kinds.items()}
    check(export_folder, models, write(tmp_path / "items.jsonl", ITEMS))


def test_masked_models_and_detectors_of_transformers(export_folder: Path, tmp_path: Path) -> None:
    items = write(tmp_path / "items.jsonl", ITEMS)
    size = len(Tokenizer.from_pretrained(export_folder))
    bert, electra = BertConfig(vocab_size=size, **SIZES), ElectraConfig(vocab_size=size, embedding_size=16, **SIZES)
    for kind, config, name, sign in (
        (BertForMaskedLM, bert, "mlm", 1.0),
        (ElectraForMaskedLM, electra, "mlm", 1.0),
        (ElectraForPreTraining, electra, "rtd", -1.0),
    ):
        folder = foreign(kind, config, export_folder, tmp_path / kind.__name__)
        check(folder, {name: (kind.from_pretrained(folder), sign)}, items)
    with pytest.raises(UserError, match=r"has rtd, not mlm; give a folder as it was pretrained"):
        open_scorer(tmp_path / "ElectraForPreTraining", ["mlm"])


def test_a_fine_tuned_folder_has_no_head_to_ask(export_folder: Path, tmp_path: Path) -> None:
    model = MetroForSequenceClassification.from_pretrained(export_folder)
    model.save_pretrained(tmp_path / "tuned")
    with pytest.raises(UserError, match="has no pretrained head that scores tokens"):
        open_scorer(tmp_path / "tuned")


def test_means_are_sums_over_tokens(export_folder: Path, tmp_path: Path) -> None:
    scorer, prompts = open_scorer(export_folder, ["rtd"]), read_prompts(write(tmp_path / "items.jsonl", ITEMS))
    sums, means = (scorer.scores(scorer.heads[0], prompts, 8, average) for average in (False, True))
    for prompt, of_sums, of_means in zip(prompts, sums, means, strict=True):
        for number, (total, mean) in enumerate(zip(of_sums, of_means, strict=True)):
            assert mean * len(scorer.encode(prompt.filled(number))[1]) == pytest.approx(total)


def test_demonstrations_stand_before_every_item_in_their_order(tmp_path: Path) -> None:
    shots = write(tmp_path / "shots.jsonl", [ITEMS[3], ITEMS[1]])
    prompts = read_prompts(write(tmp_path / "items.jsonl", ITEMS), read_demonstrations(shots))
    before = "the house was green green the river good a green bird. "
    assert [[prompt.filled(i).text for i in range(len(prompt.candidates))] for prompt in prompts] == [
        [before + text for text in texts] for texts in TEXTS
    ]
    begin = len(before) + len("the river ")
    assert prompts[1].filled(1) == Filled(before + TEXTS[1][1], begin, begin + len("was bad"))
    with pytest.raises(UserError, match=r"line 1, 3: a demonstration needs a label"):
        read_demonstrations(write(tmp_path / "bare.jsonl", [ITEMS[2], ITEMS[0], ITEMS[2]]))


def test_bad_items_are_named_by_line(tmp_path: Path) -> None:
    bad = [
        {"candidates": ["a"]},
        {"candidates": ["a", "a"]},
        {"candidates": ["a", "b"], "label": 2},
        {"candidates": ["a", "b"], "template": "no place"},
        {"candidates": ["a", "b"], "template": "{text} {candidate}"},
    ]
    with pytest.raises(UserError) as caught:
        read_prompts(write(tmp_path / "items.jsonl", bad))
    for number, (problem, said) in enumerate(
        zip(
            caught.value.problems,
            ["two strings or more", "names one twice", "its number, 0 to 1", "{candidate} once", "there is no text"],
            strict=True,
        ),
        start=1,
    ):
        assert f"line {number}: " in problem and said in problem


def test_items_are_lines_as_json_has_them_and_keys_are_known(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    item = '{"text": "a\u2028b\u0085", "candidates": ["c", "d"], "id": 7, "test": 1}'
    path.write_text(f"\ufeff{item}\r\n\n{item}\n", encoding="utf-8")
    prompts = read_prompts(path)
    assert [(prompt.line, prompt.before) for prompt in prompts] == [(1, "a\u2028b\u0085 "), (3, "a\u2028b\u0085 ")]
    for wrong, said in (
        (b'{"candidates": ["a", "b"], "Label": 0}', "line 1: has 'Label'; did you mean label"),
        (b'{"candidates": ["a", "b"], "templates": "a {candidate}"}', "line 1: has 'templates'; did you mean template"),
        (b'{"candidates": ["a", "b"], "candidates": ["a", "c"]}', "line 1: an object has 'candidates' 2 times"),
        (b'{"candidates": ["\xe9", "b"]}', "line 1: not UTF-8 at byte 17"),
        (b'{"candidates": ["\\ud83d", "b"]}', "line 1: holds half of a surrogate pair"),
        (b'["a"]', "line 1: is a list, must be an object"),
        (b"\n", "holds no items"),
    ):
        path.write_bytes(wrong)
        with pytest.raises(UserError, match=said):
            read_prompts(path)


def test_candidates_without_tokens_are_refused(tmp_path: Path, export_folder: Path) -> None:
    """They would win with a sum of no terms."""
    scorer = open_scorer(export_folder, ["rtd"])
    backend = json.loads(scorer.tokenizer.backend_tokenizer.to_str())
    backend["normalizer"] = {"type": "Replace", "pattern": {"String": "é"}, "content": ""}
    tokenizer = Tokenizer(tokenizer_object=Backend.from_str(json.dumps(backend)))
    prompts = read_prompts(write(tmp_path / "items.jsonl", [{"text": "a", "candidates": ["cat", "éé"]}]))
    assert scorer.problems(prompts) == []
    assert replace(scorer, tokenizer=tokenizer).problems(prompts) == [
        "line 1: the tokenizer has no token for the candidate 'éé'",
        "1 such lines; give candidates of the tokenizer's characters",
    ]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("{", "config.json: unreadable"),
        ("[]", "config.json: unreadable"),
        (
            '{"model_type": "new", "auto_map": {"AutoConfig": "a.B"}}',
            "transformers has no model_type 'new', and",
        ),
        (None, "config.json: no such file"),
    ],
)
def test_folders_that_transformers_cannot_read_by_itself(tmp_path: Path, config: str | None, said: str) -> None:
    if config:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match=said):
        open_scorer(tmp_path)


def test_the_tool_writes_scores_and_choices(
    export_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    items, output = write(tmp_path / "items.jsonl", ITEMS), tmp_path / "out" / "scores.jsonl"
    argv = ["--model", str(export_folder), "--input", str(items), "--output", str(output), "--device", "cpu"]
    assert exit_code(lambda: call_with_options(main, argv)) == 0
    printed = capsys.readouterr().out
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    right = dict.fromkeys(("clm", "rtd", "mlm"), 0)
    for line in lines:
        for head, scores in line["scores"].items():
            assert line["choice"][head] == line["candidates"][scores.index(max(scores))]
            right[head] += line["choice"][head] == line.get("label")
    assert all(f"  {head}: accuracy {number / 3:.4f} (chance 0.4444)" in printed for head, number in right.items())
    shots = write(tmp_path / "shots.jsonl", [ITEMS[0]] * 9)
    assert exit_code(lambda: call_with_options(main, [*argv, "--shots", str(shots)])) == 2
    assert "line 1: 152 tokens, the model reads 40" in capsys.readouterr().err


def test_a_head_is_seen_beside_the_commonest_label(tmp_path: Path) -> None:
    items = [{"text": "a", "candidates": ["good", "bad"], "label": label} for label in (1, 1, 0, 1)]
    scores = {"rtd": [[-1.0, -2.0], [-1.0, -1.0], [-3.0, -2.0], [-2.0, -1.0]]}
    assert describe(read_prompts(write(tmp_path / "items.jsonl", items)), scores, 2).splitlines() == [
        "4 items, 4 with a label, 2 shots",
        "  rtd: accuracy 0.2500 (chance 0.5000, always 'bad' 0.7500)",
    ]
