import pytest
import torch

from fused.relative_bias import CompactBias, check_bias, clip_distances


@pytest.mark.parametrize("reach, length", [(3, 9), (9, 4), (0, 3), (2, 1)])
def test_expanded_bias_equals_its_definition(reach, length):
    bias = CompactBias(torch.randn(2, 2 * reach + 1), torch.randn(2, 2))
    dense = bias.expand(length)
    for head in range(2):
        for query in range(length):
            for key in range(length):
                wanted = bias.distances[head, max(-reach, min(reach, key - query)) + reach]
                if query == 0:
                    wanted = bias.cls[head, 0]
                elif key == 0:
                    wanted = bias.cls[head, 1]
                assert dense[head, query, key] == wanted


def test_without_a_part_for_cls_only_distances_count():
    distances = torch.randn(2, 5)
    bias = CompactBias(distances, None)
    check_bias(bias, 2, distances.device)
    assert bias.expand(4)[:, 0].equal(distances[:, [2, 3, 4, 4]])
    assert bias.expand(4)[:, :, 0].equal(distances[:, [2, 1, 0, 0]])


@pytest.mark.parametrize("reach", [0, 1, 3, 4, 7])
def test_distances_are_clipped_as_the_bias_is(reach):
    sums = torch.randn(2, 9)
    wanted = torch.zeros(2, 2 * reach + 1)
    for distance in range(-4, 5):
        wanted[:, max(-reach, min(reach, distance)) + reach] += sums[:, distance + 4]
    torch.testing.assert_close(clip_distances(sums, reach), wanted)


@pytest.mark.parametrize(
    "distances, cls, message",
    [
        (torch.zeros(2, 4), torch.zeros(2, 2), r"bias.distances is \[2, 4\]"),
        (torch.zeros(3, 5), torch.zeros(2, 2), r"bias.distances is \[3, 5\]"),
        (torch.zeros(2, 5), torch.zeros(2, 1), r"bias.cls is \[2, 1\]"),
        (torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 2), "bias.distances is torch.int64"),
    ],
)
def test_bad_bias_is_named(distances, cls, message):
    with pytest.raises(ValueError, match=message):
        check_bias(CompactBias(distances, cls), 2, torch.device("cpu"))
