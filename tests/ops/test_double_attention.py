"""`double_attention` against the naive float64 form: shapes around the tile edges, both forms of the keys."""

import cases
import pytest
import torch
from accuracy import seeds
from checks import assert_accurate

import fastsam

SIZES = [(1, 1), (3, 5), (4, 4), (1, 17), (47, 1), (6, 8), (7, 7), (7, 9), (8, 8), (5, 13), (97, 1)]
CHANNELS = [1, 3, 8, 13, 64, 65]
KEYS = [None, 1, 3, 16, 17]
OUT = [None, 1, 7, 16, 33, 65]

# Every size with folded and with projected keys, the other dimensions in turn; then every channels x keys at N = 17.
SHAPES = [
    (size, CHANNELS[(2 * index + shift) % 6], keys, OUT[(index + shift) % 6])
    for index, size in enumerate(SIZES)
    for shift, keys in enumerate((None, KEYS[1 + index % 4]))
] + [((1, 17), channels, keys, OUT[index % 6]) for index, channels in enumerate(CHANNELS) for keys in KEYS]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(("size", "channels", "keys", "out"), SHAPES)
def test_shapes(backend_name, poison, size, channels, keys, out, dtype):
    options = {"channels": channels, "size": size, "keys": keys, "out": out, "dtype": dtype}
    draws = [cases.double_attention(seed=seed, **options) for seed in seeds(dtype, channels)]
    assert_accurate("double_attention", draws)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("keys", [None, 16])
def test_model_sized(backend_name, poison, three_threads, keys, dtype):
    arguments = cases.double_attention(3, 64, (16, 16), keys=keys, dtype=dtype)
    assert_accurate("double_attention", arguments)


def test_256_channels(backend_name, poison):
    arguments = cases.double_attention(1, 256, (5, 7), out=256, dtype=torch.float32)
    assert_accurate("double_attention", arguments)


def test_one_batch_element_does_not_see_another(backend_name):
    arguments = cases.double_attention(3, 5, (4, 4), keys=3)
    whole = fastsam.ops.double_attention(**arguments)
    for index in range(3):
        alone = {**arguments, "h": arguments["h"][index : index + 1], "m": arguments["m"][index : index + 1]}
        torch.testing.assert_close(fastsam.ops.double_attention(**alone), whole[index : index + 1])


def test_folded_keys_equal_projected_keys(backend_name):
    projected = cases.double_attention(2, 7, (5, 6), keys=3)
    folded = dict(projected)
    for source in "hm":
        key = folded.pop(f"key_{source}")
        folded[f"score_{source}"] = key.T @ folded[f"score_{source}"]
        folded[f"score_bias_{source}"] = key.T @ folded[f"score_bias_{source}"]
    torch.testing.assert_close(fastsam.ops.double_attention(**folded), fastsam.ops.double_attention(**projected))


def test_the_same_map_twice(backend_name):
    """One tensor as hidden state and as memory: its gradient is the sum of both."""
    arguments = cases.double_attention(2, 5, (4, 3))
    both = arguments["h"].clone().requires_grad_()
    fastsam.ops.double_attention(**{**arguments, "h": both, "m": both}).square().sum().backward()
    h, m = (arguments["h"].clone().requires_grad_() for _ in range(2))
    fastsam.ops.double_attention(**{**arguments, "h": h, "m": m}).square().sum().backward()
    torch.testing.assert_close(both.grad, h.grad + m.grad)
