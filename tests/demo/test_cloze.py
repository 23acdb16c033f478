import json
from dataclasses import replace

import pytest
import torch

from metro_megatron.commands import score
from metro_megatron.errors import UserError
from metro_megatron.evaluate.prompts import read_prompts
from metro_megatron.evaluate.ranking import open_scorer
from tests.hf.pair import WORDS, write_export
from tools.demo.cloze import Options, accuracy, main, tfidf_accuracy


def write_gaps(path, count):
    """Each with the right word at another place of its candidates."""
    lines = []
    for i in range(count):
        words = [WORDS[(i + j) % len(WORDS)] for j in range(7)]
        template = f"{words[0]} {words[1]} {{candidate}} {words[2]}"
        lines.append(json.dumps({"template": template, "candidates": words[3:], "label": words[3 + i % 4]}))
    path.write_text("\n".join(lines))
    return path


def test_each_part_is_asked_of_the_export_as_the_tool_for_prompts_does_and_of_random_heads(tmp_path):
    folder, gaps = write_export(tmp_path), write_gaps(tmp_path / "test.jsonl", 60)
    made = tmp_path / "made" / "cloze.json"
    main(Options(str(folder), str(gaps), str(gaps), str(made)))
    found = json.loads(made.read_text())
    score.main(score.Options(str(folder), str(gaps), str(tmp_path / "scores.jsonl"), heads=["rtd"], average=True))
    rows = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    right = [row["choice"]["rtd"] == row["label"] for row in rows]
    assert found["pretrained"] == [sum(right[seed::3]) / 20 for seed in range(3)] and 0 < sum(right) < 60
    assert len(found["random_init"]) == 3 and found["random_init"] != found["pretrained"]
    assert (found["chance"], found["num_train"], found["num_test"]) == (0.25, 60, 60)
    with pytest.raises(UserError, match="60 gapped sentences, must be one for each of 61"):
        main(Options(str(folder), str(gaps), str(gaps), str(made), seeds=61))


def test_a_head_that_detects_what_is_wrong_is_always_right(tmp_path):
    """Logits that an oracle gives in the model's place."""
    prompts = read_prompts(write_gaps(tmp_path / "test.jsonl", len(WORDS)))
    scorer = open_scorer(write_export(tmp_path), ["rtd"])
    right = {prompt.filled(prompt.label).text for prompt in prompts}

    class Oracle(torch.nn.Module):
        device, sign = torch.device("cpu"), 1.0

        def forward(self, input_ids, attention_mask):
            texts = scorer.tokenizer.batch_decode(input_ids, skip_special_tokens=True)
            logits = torch.tensor([self.sign if text.strip() in right else -self.sign for text in texts])
            return type("Output", (), {"logits": logits[:, None].expand(input_ids.shape)})

    oracle = Oracle()
    told = replace(scorer, heads=[replace(scorer.heads[0], model=oracle)])
    assert accuracy(told, prompts) == 1.0
    oracle.sign = -1.0
    assert accuracy(told, prompts) == 0.0


def test_tfidf_finds_a_telling_pair(tmp_path):
    def rows(name, labels):
        path = tmp_path / name
        lines = [{"template": "we saw a {candidate} film", "candidates": list("cbad"), "label": one} for one in labels]
        path.write_text("\n".join(map(json.dumps, lines)).replace('"c"', '"cc"').replace('"b"', '"bb"'))
        return read_prompts(path)

    with_long_words = rows("train.jsonl", ["c"] * 8)
    assert tfidf_accuracy(with_long_words, rows("test.jsonl", ["c", "c", "c", "b"])) == 0.75
