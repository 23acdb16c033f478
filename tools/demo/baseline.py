"""A figure for scale: word and word-pair frequencies with logistic regression."""

import json
from pathlib import Path

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from metro_megatron.cli.command_line import run_tool
from metro_megatron.finetune.examples import LabelledTexts, read_labelled_texts


def main(train_file: str, test_file: str, output: str) -> None:
    """Classify sentences by TF-IDF and logistic regression, and write the accuracy.

    Args:
        train_file: labelled texts to learn from
        test_file: labelled texts to be scored on
        output: JSON file to write
    """
    accuracy = tfidf_accuracy(read_labelled_texts(Path(train_file)), read_labelled_texts(Path(test_file)))
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    Path(output).write_text(json.dumps({"tfidf_accuracy": accuracy}) + "\n", encoding="utf-8")
    print(f"{output}: TF-IDF with logistic regression has accuracy {accuracy:.4f}")


def tfidf_accuracy(train: LabelledTexts, test: LabelledTexts) -> float:
    """Accuracy on `test` of logistic regression over TF-IDF of words and word pairs of `train`."""
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=4.0, max_iter=1000)
    )
    model.fit(train.first, train.labels)
    return float(model.score(test.first, test.labels))


if __name__ == "__main__":
    run_tool(main)
