"""`self_attention` against the naive float64 form: shapes around the tile edges, both forms of the keys."""

import cases
import pytest
import torch
from accuracy import seeds
from checks import assert_accurate
from test_double_attention import SHAPES

import fastsam


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(("size", "channels", "keys", "out"), SHAPES)
def test_shapes(backend_name, poison, size, channels, keys, out, dtype):
    options = {"channels": channels, "size": size, "keys": keys, "out": out, "dtype": dtype}
    draws = [cases.self_attention(seed=seed, **options) for seed in seeds(dtype, channels)]
    assert_accurate("self_attention", draws)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("keys", [None, 16])
def test_model_sized(backend_name, poison, three_threads, keys, dtype):
    arguments = cases.self_attention(batch=3, channels=64, size=(16, 16), keys=keys, dtype=dtype)
    assert_accurate("self_attention", arguments)


def test_is_the_first_source_of_double_attention(backend_name):
    arguments = cases.double_attention(2, 5, (4, 4), keys=3)
    alone = fastsam.ops.self_attention(**cases.self_attention(batch=2, channels=5, size=(4, 4), keys=3))
    arguments["value_m"] = torch.zeros_like(arguments["value_m"])
    torch.testing.assert_close(alone, fastsam.ops.double_attention(**arguments))


def test_one_position_returns_its_own_value(backend_name):
    arguments = cases.self_attention(batch=2, channels=5, size=(1, 1))
    expected = torch.einsum("oc,bchw->bohw", arguments["value"], arguments["x"])
    expected = expected + arguments["value_bias"][:, None, None]
    torch.testing.assert_close(fastsam.ops.self_attention(**arguments), expected)
