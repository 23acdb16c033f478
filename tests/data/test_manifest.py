"""Records of a dataset: histograms of lengths, and what is said of damage."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metro_megatron.data.manifest import EDGES, DatasetPaths, LengthHistogram, Manifest, read_manifest
from metro_megatron.data.records import SEAL, DamagedRecord, from_plain, plain, sealed
from metro_megatron.errors import UserError
from tests.data.two_sources import write_two_sources


def test_bins_are_powers_of_the_root_of_two():
    assert EDGES[:12].tolist() == [1, 2, 3, 4, 6, 8, 12, 16, 23, 32, 46, 64]
    assert EDGES[-1] == 1 << 31


def test_counts_sums_and_json():
    lengths = np.random.default_rng(1).integers(1, 10_000, 5000)
    histogram = LengthHistogram.from_lengths(lengths)
    expected, _ = np.histogram(lengths, bins=[*EDGES, 1 << 40])
    assert histogram.counts.tolist() == expected.tolist() and histogram.total == 5000
    assert LengthHistogram.from_lengths(lengths[:100]) + LengthHistogram.from_lengths(lengths[100:]) == histogram
    assert LengthHistogram.from_json(json.loads(json.dumps(histogram.to_json()))) == histogram
    assert LengthHistogram.from_lengths([]) == LengthHistogram() and LengthHistogram().to_json() == {}
    assert LengthHistogram.from_lengths([1, 7, 8]).to_json() == {"1": 1, "6": 1, "8": 1}
    for content in ({"5": 1}, {"one": 1}, {"1": "1"}, {"1": True}):
        with pytest.raises(ValueError, match="no histogram"):
            LengthHistogram.from_json(content)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, reviews: list[list[str]], tokenizer_folder: Path) -> str:
    folder = tmp_path_factory.mktemp("dataset")
    write_two_sources(folder, reviews, tokenizer_folder)
    return str(folder / "d")


def test_a_manifest_is_written_as_it_is_read(dataset: str) -> None:
    manifest = read_manifest(dataset)
    assert sealed(manifest) == DatasetPaths(dataset).manifest.read_bytes()
    assert from_plain(Manifest, plain(manifest)) == manifest
    assert [source.name for source in manifest.sources] == ["long", "short"]
    ends = np.cumsum([shard.documents for shard in manifest.shards]).tolist()
    runs = [run for number in range(len(ends)) for run in manifest.runs(number)]
    assert sum(end - begin for source, begin, end in runs if source == 0) == manifest.sources[0].documents == 300
    assert len(runs) == len(ends) + 1, "one shard holds documents of both"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("units"), "no usable units"),
        (lambda m: m.update(units="many", tokens=True), "no usable units, tokens"),
        (lambda m: m.update(extra=1), "unknown extra"),
        (lambda m: m["shards"].__setitem__(1, 3), "shard 1 is damaged: no object"),
        (lambda m: m["shards"][1]["bin"].pop("bytes"), "shard 1 is damaged: bin is damaged: no usable bytes"),
        (
            lambda m: m["sources"][1]["options"].update(unit=3),
            "source 1 is damaged: options is damaged: no usable unit",
        ),
        (lambda m: m["sources"][0]["files"][0]["pieces"][0].pop(), "file 0 is damaged: no usable pieces"),
        (lambda m: m["sources"][0].update(unit_lengths={"5": 1}), "source 0 is damaged: no usable unit_lengths"),
        (lambda m: m["rejects"].update(empty=None), "no usable rejects"),
    ],
)
def test_damage_is_named(
    dataset: str, tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    content = json.loads(DatasetPaths(dataset).manifest.read_bytes())
    del content[SEAL]
    change(content)
    with pytest.raises(DamagedRecord, match=message):
        from_plain(Manifest, content)
    DatasetPaths(str(tmp_path / "d")).manifest.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"d.manifest.json: damaged .*{message}.*preprocess_data.py"):
        read_manifest(str(tmp_path / "d"))
