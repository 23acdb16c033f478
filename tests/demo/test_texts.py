import json
from collections import Counter

import pytest

from metro_megatron.errors import UserError
from metro_megatron.finetune.examples import LabelledTexts, read_labelled_texts
from metro_megatron.text.documents import read_documents
from metro_megatron.text.inputs import find_inputs
from tools.demo.baseline import tfidf_accuracy
from tools.demo.texts import (
    GAPS,
    LEAST_COUNT,
    PARTS,
    RANKS_APART,
    Sentence,
    find_overlaps,
    gaps,
    intact_and_shuffled,
    split_texts,
    word_ranks,
    write_texts,
)

REVIEWS = [f"Review number {i} has words of its own.\n\nIt ends w{i} x{i} y{i} z{i} v{i} u{i}." for i in range(40)]


def test_overlaps_are_six_words_in_a_row_whatever_the_case_and_the_signs():
    documents = ["He said: The QUICK brown fox, jumps over it!", "one two three four five"]
    sentences = [
        "the quick brown fox jumps over the lazy dog",  # six words, signs between them in the document
        "the quick brown fox jumps",  # five words only
        "quick the brown fox jumps over it",  # another order: "brown fox jumps over it" is five
        "one two three four five",  # a whole document, but five words
        "",
    ]
    assert find_overlaps(sentences, documents) == {0}


def test_an_overlap_does_not_span_two_documents():
    assert find_overlaps(["a b c d e f"], ["a b c", "d e f"]) == set()


def test_split_drops_duplicates_and_overlaps_and_keeps_everything_else():
    sentences = [Sentence(f"sentence {i} is about thing {i} and more", str(i % 2)) for i in range(200)]
    stolen = Sentence("w3 x3 y3 z3 v3 u3, he wrote", "1")
    texts = split_texts([*REVIEWS, REVIEWS[0], REVIEWS[7]], [*sentences, stolen], held_out=10)
    assert (texts.duplicates, len(texts.reviews), len(texts.held_out)) == (2, 30, 10)
    assert not set(texts.reviews) & set(texts.held_out)
    is_in_training = any("w3 x3" in review for review in texts.reviews)
    assert texts.overlaps == is_in_training == (stolen not in texts.sentiment_train + texts.sentiment_test)
    assert {*texts.sentiment_train, *texts.sentiment_test} - {stolen} == set(sentences)
    assert not set(texts.sentiment_train) & set(texts.sentiment_test)
    assert 20 <= len(texts.sentiment_test) <= 60


def test_acceptability_is_not_told_by_words_and_keeps_reviews_on_one_side():
    reviews = [f"Of review {i} {' '.join(f'{w}{i}' for w in 'abcdefgh')} is the end. Too short." for i in range(300)]
    texts = split_texts(reviews, [], held_out=100)
    train, test = texts.acceptability_train, texts.acceptability_test
    assert len(train) + len(test) == 200 and 30 < len(test) < 110
    for part in (train, test):
        intact, shuffled = (
            Counter(word for one in part if one.label == label for word in one.text.split())
            for label in ("intact", "shuffled")
        )
        assert intact == shuffled and len({one.text for one in part}) == len(part)
    numbers = [{word[1:] for one in part for word in one.text.split() if word[0] == "a"} for part in (train, test)]
    held_out = {review.split()[2] for review in texts.held_out}
    assert not numbers[0] & numbers[1] and numbers[0] | numbers[1] == held_out
    for intact, shuffled in zip(train[::2], train[1::2], strict=True):
        moved = [i for i, (a, b) in enumerate(zip(intact.text.split(), shuffled.text.split(), strict=True)) if a != b]
        assert 2 <= len(moved) <= 4 and moved[-1] - moved[0] <= 3
        assert sorted(intact.text.split()) == sorted(shuffled.text.split())


def test_few_sentences_of_each_review():
    review = " ".join(f"This is sentence number {i} of the very same long review." for i in range(10))
    assert len(intact_and_shuffled([review])) == 4


def test_a_gap_has_four_words_that_are_about_as_frequent_and_the_sentence_back():
    words = [f"{first}{second}" for first in "abcdefgh" for second in "lmnopqrs"]
    reviews = [" ".join(words[: 60 - number // 40]) for number in range(LEAST_COUNT * 20)] + [
        "zz-zz don't Zz ab1"
    ] * 200
    ranks = word_ranks(reviews)
    assert list(ranks) == words[:58] and list(ranks.values()) == list(range(58))
    sentences = {f"There {' '.join(words[i : i + 8])} he's {words[-1]}-like (zz)." for i in range(44)}
    found = gaps(sorted(sentences), ranks)
    assert {one["template"].replace("{candidate}", one["label"]) for one in found} == sentences
    for one in found:
        assert len(set(one["candidates"])) == 4 and one["label"] in one["candidates"]
        others = set(one["candidates"]) - {one["label"]}
        assert not others & set(one["template"].split())
        assert all(abs(ranks[other] - ranks[one["label"]]) <= RANKS_APART for other in others)
    assert len({one["candidates"].index(one["label"]) for one in found}) == 4
    assert gaps(["No word of it is frequent enough to be left out here."], ranks) == []


def test_parts_do_not_depend_on_the_order():
    sentences = [Sentence(f"sentence {i} of many", "0") for i in range(50)]
    one, other = split_texts(REVIEWS, sentences, 10), split_texts(REVIEWS[::-1], sentences[::-1], 10)
    for name in ("reviews", "held_out", *PARTS, *GAPS):
        assert sorted(map(repr, getattr(one, name))) == sorted(map(repr, getattr(other, name)))


def test_too_few_reviews_are_an_error():
    with pytest.raises(UserError, match="40 different reviews"):
        split_texts(REVIEWS, [], held_out=40)


def test_files_are_what_the_tools_read(tmp_path):
    sentences = [Sentence(f'sentence "{i}", with\ncommas', str(i % 2)) for i in range(30)]
    texts = split_texts(REVIEWS, sentences, held_out=5)
    write_texts(texts, tmp_path)
    documents = list(read_documents(find_inputs([str(tmp_path / "reviews.jsonl")]), rejects := Counter()))
    assert [one.units for one in documents] == [review.split("\n\n") for review in texts.reviews] and not rejects
    train = read_labelled_texts(tmp_path / "sentiment_train.csv")
    assert list(zip(train.first, train.labels, strict=True)) == [(one.text, one.label) for one in texts.sentiment_train]
    assert json.loads((tmp_path / "counts.json").read_text()) == texts.counts()
    assert texts.counts()["reviews"] == 35


def test_tfidf_finds_a_telling_word():
    train = LabelledTexts(["good film", "good plot", "bad film", "bad plot"] * 5, None, list("1100") * 5)
    test = LabelledTexts(["good story", "bad story", "a bad one", "bad"], None, list("1001"))
    assert tfidf_accuracy(train, test) == 0.75
