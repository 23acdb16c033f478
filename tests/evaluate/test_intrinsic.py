import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score
from torch.nn import functional

from metro_megatron.data.documents import TokenizedDocuments
from metro_megatron.data.samples import build_sample_index
from metro_megatron.errors import UserError
from metro_megatron.evaluate.intrinsic import (
    document_figures,
    evaluate,
    guess,
    held_out_text,
    masked_samples,
    sample_softmax,
    terms_of,
    unigram_figures,
)
from metro_megatron.evaluate.scores import read_scores
from metro_megatron.evaluate.sentences import choose_sentences, show, whole_words
from metro_megatron.hf.configuration_metro import MetroConfig
from metro_megatron.hf.modeling_metro import MetroForPreTraining
from metro_megatron.objective.term import Sums, Term
from metro_megatron.tokenizer.tokenizer import WORD_BOUNDARY, Tokenizer
from metro_megatron.vocabulary import MASK_ID, NUM_SPECIALS, PAD_ID
from tests.hf.pair import VOCAB_SIZE, WORDS

DOCUMENTS = [
    [" ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 4 + i)) for i in range(n, 30)] for n in range(1, 9)
]


@pytest.fixture(scope="module")
def pair(export_folder) -> MetroForPreTraining:
    return MetroForPreTraining.from_pretrained(export_folder).eval()


@pytest.fixture(scope="module")
def text(export_folder) -> TokenizedDocuments:
    return held_out_text(DOCUMENTS, Tokenizer.from_folder(export_folder))


def exported(term: Term, *logits_tokens_originals: torch.Tensor) -> Sums:
    logits, tokens, originals = logits_tokens_originals
    scalars = term.exported_sums(logits, tokens, originals, tokens != originals)
    assert all(value.ndim == 0 for value in scalars.values()), "kept for every sample"
    return scalars | term.exported_histograms(logits, tokens, originals)


def test_detection_figures_by_hand_and_by_sklearn():
    """One sample of <s>, a word, a word, </s> and padding: what training counts, evaluation counts."""
    term = next(term for term in terms_of(MetroConfig()) if term.name == "rtd")
    originals = torch.tensor([[0, 7, 8, 9, 2, PAD_ID]])
    tokens = torch.tensor([[0, 7, 5, 6, 2, PAD_ID]])
    logits = torch.tensor([[2.0, -1.0, 0.5, -3.0, 1.0, -99.0]])
    is_replaced = (tokens != originals)[0, :5].numpy()
    sums = {"num_tokens": torch.tensor(5), "replaced": torch.tensor(2)}
    found = term.figures(sums | exported(term, logits, tokens, originals))
    scores = logits[0, :5].double().numpy()
    assert found["rtd_loss"] == pytest.approx(log_loss(~is_replaced, 1 / (1 + np.exp(-scores))))
    assert found["rtd_auc"] == pytest.approx(roc_auc_score(~is_replaced, scores)) == 5 / 6
    assert (found["replace_accuracy"], found["non_replace_accuracy"]) == (0.5, pytest.approx(2 / 3))


def test_auc_is_sklearn_s():
    term = next(term for term in terms_of(MetroConfig()) if term.name == "rtd")
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 5000, generator=generator) * 3
    originals = torch.full((1, 5000), 7)
    tokens = originals + (torch.rand(1, 5000, generator=generator) > torch.sigmoid(logits / 4))
    sums = {"num_tokens": torch.tensor(5000), "replaced": (tokens != originals).sum()}
    found = term.figures(sums | exported(term, logits, tokens, originals))
    assert found["rtd_auc"] == pytest.approx(roc_auc_score((tokens == originals)[0], logits[0]), abs=1e-6)


def test_unigram_loss_by_hand():
    found = unigram_figures(np.array([0, 0, 2, 1]), np.array([7, 0, 2, 0]))  # with one added: 8, 1, 3, 1 of 13
    expected = -(2 * math.log(8 / 13) + math.log(3 / 13) + math.log(1 / 13)) / 4
    assert found == {"unigram_loss": pytest.approx(expected), "unigram_accuracy": 0.5}


def test_samples_follow_the_softmax():
    logits = torch.tensor([0.0, math.log(2), math.log(5)]).expand(8000, 3)
    noise = (torch.arange(8000, dtype=torch.float64) + 0.5) / 8000
    assert sample_softmax(logits, noise).bincount().tolist() == [1000, 2000, 5000]
    sure = torch.tensor([[-math.inf, 0.0, -math.inf]]).expand(2, 3)
    assert sample_softmax(sure, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)).tolist() == [1, 1]


def test_masks_are_15_percent_of_the_tokens_and_spare_specials(text):
    index = build_sample_index([text], 40)
    batch = masked_samples(text, index, np.arange(len(index)), seed=1)
    assert int(batch.is_real.sum()) == index.num_tokens
    assert bool((batch.ids[batch.is_masked] >= NUM_SPECIALS).all())
    assert abs(int(batch.is_masked.sum()) / index.num_tokens - 0.15) < 0.01
    assert len(batch.noise) == int(batch.is_masked.sum())
    assert not torch.equal(batch.is_masked, masked_samples(text, index, np.arange(len(index)), seed=2).is_masked)


def test_guesses_are_those_of_the_whole_forward_pass(pair, text):
    index = build_sample_index([text], pair.config.max_position_embeddings)
    batch = masked_samples(text, index, np.array([3, 0, 5]), seed=1)
    found = guess(pair, batch)
    with torch.no_grad():
        masked = batch.ids.masked_fill(batch.is_masked, MASK_ID)
        whole = pair(masked, batch.is_real, noised_input_ids=found.noised)
    torch.testing.assert_close(found.logits["aux"], whole.mlm_logits[batch.is_masked], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.logits["clm"], whole.clm_logits[batch.is_masked], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        found.logits["rtd"][batch.is_real], whole.rtd_logits[batch.is_real], atol=1e-4, rtol=1e-4
    )
    assert torch.equal(found.noised[~batch.is_masked], batch.ids[~batch.is_masked])


def test_figures_are_means_over_the_text_whatever_the_batch(pair, text):
    counts = np.bincount(text.tokens, minlength=VOCAB_SIZE)
    seen: list[tuple[int, int]] = []
    one = evaluate(pair, text, counts, 4, 1, lambda done, total: seen.append((done, total)))
    other = evaluate(pair, text, counts, 1000, 1, lambda done, total: None)
    assert one == pytest.approx(other, rel=1e-4, nan_ok=True)
    assert seen == [(i, -(-one["num_samples"] // 4)) for i in range(1, len(seen) + 1)]
    index = build_sample_index([text], pair.config.max_position_embeddings)
    batch = masked_samples(text, index, np.arange(len(index)), 1)
    guesses, targets = guess(pair, batch), batch.ids[batch.is_masked]
    assert one["aux_loss"] == pytest.approx(functional.cross_entropy(guesses.logits["aux"], targets).item(), rel=1e-4)
    assert one["clm_loss"] == pytest.approx(functional.cross_entropy(guesses.logits["clm"], targets).item(), rel=1e-4)
    assert one["clm_accuracy"] == pytest.approx((guesses.logits["clm"].argmax(-1) == targets).float().mean().item())
    is_replaced = (guesses.noised != batch.ids)[batch.is_real]
    assert one["replace_rate"] == pytest.approx(is_replaced.float().mean().item())


def test_a_document_has_the_figures_of_an_evaluation_that_reads_no_other(pair, text):
    counts = np.bincount(text.tokens, minlength=VOCAB_SIZE)
    of_samples = {}
    whole = evaluate(pair, text, counts, 5, 1, lambda done, total: None, of_samples)
    assert whole == evaluate(pair, text, counts, 5, 1, lambda done, total: None)
    found = document_figures(pair.config, text, of_samples)
    assert len(found) == len(DOCUMENTS)
    counted = []
    index = build_sample_index([text], pair.config.max_position_embeddings)
    bounds = np.cumsum([0, *text.unit_lengths])[text.document_index]
    for number, (low, high) in enumerate(zip(bounds, bounds[1:], strict=False)):
        samples = np.flatnonzero((index.start >= low) & (index.start < high))
        batch = masked_samples(text, index, samples, 1)
        guesses = guess(pair, batch)
        targets = batch.ids[batch.is_masked]
        expected = functional.cross_entropy(guesses.logits["aux"], targets).item()
        assert found[number]["aux_loss"] == pytest.approx(expected, rel=1e-4)
        is_original = (guesses.noised == batch.ids)[batch.is_real].float()
        expected = functional.binary_cross_entropy_with_logits(guesses.logits["rtd"][batch.is_real], is_original)
        assert found[number]["rtd_loss"] == pytest.approx(expected.item(), rel=1e-4)
        counted.append({"masked": len(targets), "tokens": len(is_original)})
    for name, over in (("clm_loss", "masked"), ("rtd_loss", "tokens")):
        total = sum(one[name] * count[over] for one, count in zip(found, counted, strict=True))
        assert whole[name] == pytest.approx(total / sum(count[over] for count in counted), rel=1e-5)


def test_no_text_is_an_error(export_folder):
    with pytest.raises(UserError, match="no text"):
        held_out_text([], Tokenizer.from_folder(export_folder))


def test_sentences_of_some_length_one_a_document():
    documents = [["Too short. " + "word " * 9 + "end. Another one."], ["None."], ["a " * 10 + "b!", "c " * 12 + "d?"]]
    assert choose_sentences(documents, 5) == ["word " * 9 + "end.", "a " * 10 + "b!"]
    assert choose_sentences(documents, 1) == ["word " * 9 + "end."]
    assert choose_sentences(documents, 0) == []


def test_shown_sentences_are_marked_where_something_happened(pair, export_folder):
    sentence = "the old cat sees a green bird, it finds é the house."
    counts = np.arange(VOCAB_SIZE)
    (shown,) = show(pair, export_folder, [sentence], counts, seed=3)
    assert shown.original == sentence
    num_masked = shown.masked.count("<mask>")
    assert num_masked >= 1 and shown.filled.count("[") == num_masked
    assert "{" not in shown.filled and "[" not in shown.corrected
    (again,) = show(pair, export_folder, [sentence], counts, seed=3)
    assert again == shown and "original" in str(shown)
    total = counts.sum() + VOCAB_SIZE
    assert len(shown.masks) == num_masked
    for mask in shown.masks:
        probabilities = [one.probability for one in mask.guesses]
        assert probabilities == sorted(probabilities, reverse=True) and sum(probabilities) <= 1
        assert max(probabilities) >= mask.probability > 0
        assert mask.frequent.probability == pytest.approx(VOCAB_SIZE / total) and mask.token in sentence


def test_masks_of_shown_sentences_are_whole_words_of_one_token_first(export_folder):
    """Words of several tokens are masked only where there are no others, and then all of their tokens."""
    tokenizer = Tokenizer.from_folder(export_folder)
    for sentence in ("the old cat sees a green bird, it finds é the house.", "ééé"):
        text = held_out_text([[sentence]], tokenizer)
        batch = masked_samples(text, build_sample_index([text], 64), np.zeros(1, np.int64), seed=1)
        for seed in range(20):
            found = whole_words(batch, tokenizer, seed)
            tokens = [tokenizer.token(one) for one in found.ids[0].tolist()]
            masked = found.is_masked[0].tolist()
            assert len(found.noise) == sum(masked) > 0
            begins = [i for i, token in enumerate(tokens) if token.startswith(WORD_BOUNDARY)] + [len(tokens) - 1]
            words = [range(*pair) for pair in itertools.pairwise(begins)]
            assert all(len({masked[i] for i in word}) == 1 for word in words) and not masked[0] and not masked[-1]
            if any(len(word) == 1 for word in words):
                assert all(len(word) == 1 for word in words if masked[word[0]])


def test_the_tool(export_folder, tmp_path, monkeypatch, capsys):
    import metro_megatron.commands.evaluate as tool
    from metro_megatron.preprocess.run import PreprocessOptions, preprocess

    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(json.dumps({"text": ".\n".join(units)}) + "\n" for units in DOCUMENTS) + "{broken\n")
    prefix = str(tmp_path / "shard")
    with pytest.raises(UserError, match="no such dataset"):
        tool.main(tool.Options(str(export_folder), [str(held_out)], str(tmp_path / "f.json"), prefix))
    preprocess(PreprocessOptions([str(held_out)], str(export_folder), prefix, max_reject_fraction=0.5))
    tool.main(tool.Options(str(export_folder), [str(held_out)], str(tmp_path / "f.json"), prefix, sentences=2))
    figures = json.loads(Path(tmp_path / "f.json").read_text())
    assert len(figures["examples"]["sentences"]) == 2 and "auxiliary" in figures["examples"]["legend"]
    documents = tmp_path / "scores" / "held_out.jsonl"
    command = str(export_folder), [str(held_out)], str(tmp_path / "g.json"), prefix, str(documents)
    tool.main(tool.Options(*command, sentences=2))
    scores = read_scores(documents)
    assert json.loads((tmp_path / "g.json").read_text()) == figures
    assert scores.keys() >= {"held_out.aux_loss", "held_out.rtd_loss"} and len(scores["held_out.rtd_loss"]) == 8
    printed = capsys.readouterr().out
    assert f"MLM loss {figures['aux_loss']:.3f}" in printed and "1 records rejected" in printed
    assert figures["num_documents"] == len(DOCUMENTS) and figures["unigram_loss"] < math.log(VOCAB_SIZE)
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        tool.main(tool.Options(str(tmp_path), [str(held_out)], str(tmp_path / "f.json"), prefix))
