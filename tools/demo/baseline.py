"""Figures for scale: word and word-pair frequencies with logistic regression, and always saying the same."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metro_megatron.cli.command_line import run_tool
from metro_megatron.files import replace_text
from metro_megatron.finetune.examples import LabelledTexts, read_labelled_texts


@dataclass(frozen=True)
class Options:
    """What from, and where to."""

    train_file: str
    """Labelled texts to learn from."""
    test_file: str
    """Labelled texts to be scored on."""
    output: str
    """JSON file to write."""


def main(options: Options) -> None:
    """Classify sentences by TF-IDF and logistic regression, and write the accuracy."""
    train, test = (read_labelled_texts(Path(path)) for path in (options.train_file, options.test_file))
    accuracy, output = tfidf_accuracy(train, test), Path(options.output)
    result = {"tfidf": accuracy, "chance": chance(test), "num_train": len(train), "num_test": len(test)}
    write_result(output, result)
    print(f"{output}: TF-IDF with logistic regression has accuracy {accuracy:.4f}")


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """What tools/demo/summary.py reads of a task."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(result, indent=2) + "\n")


def chance(test: LabelledTexts) -> float:
    """Accuracy of always saying the commonest label."""
    return max(test.labels.count(label) for label in set(test.labels)) / len(test)


def tfidf_accuracy(train: LabelledTexts, test: LabelledTexts) -> float:
    """Accuracy on `test` of what learned `train`."""
    model = tfidf_and_regression()
    model.fit(train.first, train.labels)
    return float(model.score(test.first, test.labels))


def tfidf_and_regression() -> Any:
    """scikit-learn's logistic regression over TF-IDF of words and word pairs."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    return make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=4.0, max_iter=1000)
    )


if __name__ == "__main__":
    run_tool(main)
