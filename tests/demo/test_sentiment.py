import csv
import json

import pytest

from metro_megatron.finetune.examples import read_labelled_texts
from tests.hf.pair import WORDS, write_export
from tools.demo.baseline import tfidf_accuracy
from tools.demo.sentiment import Options, main


def test_features_of_the_export_and_of_one_start_for_each_seed(tmp_path):
    """A word that says all is found by both, and more labels than there are are all of them."""
    files = []
    for name, count in (("train", 60), ("test", 30)):
        files.append(tmp_path / f"{name}.csv")
        with files[-1].open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            for i in range(count):
                words = [WORDS[(3 * i + j) % (len(WORDS) - 2)] for j in range(5)]
                writer.writerow([" ".join([*words[:2], WORDS[-1 - i % 2], *words[2:]]), str(i % 2)])
    folder = write_export(tmp_path)
    given = str(folder), *map(str, files), str(tmp_path / "made" / "sentiment.json")
    main(Options(*given, labels=1000, seeds=[1, 2]))
    found = json.loads((tmp_path / "made" / "sentiment.json").read_text())
    train, test = map(read_labelled_texts, files)
    assert found["chance"] == 0.5 and found["num_test"] == 30 and found["tfidf"] == tfidf_accuracy(train, test)
    assert found["pretrained"][0] == pytest.approx(found["pretrained"][1]) and len(found["random_init"]) == 2
    assert min(*found["pretrained"], *found["random_init"]) > 0.8
    assert found["num_train"] == 60
