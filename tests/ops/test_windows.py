"""`self_attention` in windows: each window as a map of its own."""

import cases
import pytest
import torch
from checks import evaluate

import fastsam

WINDOWS = [(2, 3), (6, 1), (1, 9), (3, 9), (6, 9)]


def _window_by_window(*, window, x, **weights):
    """The naive form of every window, put together again."""
    height, width = window
    rows = []
    for top in range(0, x.shape[2], height):
        cut = [x[:, :, top : top + height, left : left + width] for left in range(0, x.shape[3], width)]
        rows.append(torch.cat([cases.naive("self_attention")(x=part, **weights) for part in cut], dim=3))
    return torch.cat(rows, dim=2)


@pytest.mark.parametrize("keys", [None, 2])
@pytest.mark.parametrize("window", WINDOWS)
def test_as_the_naive_form_of_each_window(backend_name, poison, window, keys):
    arguments = {**cases.self_attention(batch=2, channels=5, size=(6, 9), keys=keys, out=4), "window": window}
    actual = evaluate("self_attention", fastsam.ops.self_attention, arguments).tensors()
    expected = evaluate("self_attention", _window_by_window, arguments).tensors()
    assert actual["z"].is_contiguous()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-9, atol=1e-11)


def test_strided_maps(backend_name):
    arguments = cases.self_attention(batch=2, channels=3, size=(4, 6))
    expected = fastsam.ops.self_attention(**arguments, window=(2, 3))
    for layout in cases.LAYOUTS.values():
        changed = {**arguments, "x": layout(arguments["x"])}
        whole = {**arguments, "x": changed["x"].contiguous()}
        assert torch.equal(
            fastsam.ops.self_attention(**changed, window=(2, 3)), fastsam.ops.self_attention(**whole, window=(2, 3))
        )
    assert not torch.allclose(expected, fastsam.ops.self_attention(**arguments))


def test_no_samples(backend_name):
    arguments = cases.self_attention(batch=2, channels=3, size=(4, 6))
    arguments["x"] = arguments["x"][:0]
    assert fastsam.ops.self_attention(**arguments, window=(2, 3)).shape == (0, 3, 4, 6)


@pytest.mark.parametrize("window", [(4, 3), (2, 0), (-2, 3), (12, 9)])
def test_windows_that_do_not_fit(backend_name, window):
    arguments = cases.self_attention(batch=1, channels=3, size=(6, 9))
    with pytest.raises(ValueError, match=f"window must divide the map of 6 x 9, got {window[0]} x {window[1]}"):
        fastsam.ops.self_attention(**arguments, window=window)


@pytest.mark.parametrize("window", [3, (3,), (3.0, 3), [2, 3], (2, 3, 1), "23", (True, 3)])
def test_no_pair_of_integers(backend_name, window):
    with pytest.raises(TypeError, match="window must be a pair of integers"):
        fastsam.ops.self_attention(**cases.self_attention(size=(6, 9)), window=window)


def test_autocast(backend_name):
    arguments = cases.self_attention(batch=1, channels=4, size=(4, 6), dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = fastsam.ops.self_attention(**arguments, window=(2, 3))
    wide = {name: value.float() for name, value in arguments.items()}
    torch.testing.assert_close(z, fastsam.ops.self_attention(**wide, window=(2, 3)))


def test_compiled_whole():
    arguments = cases.self_attention(batch=2, channels=4, size=(4, 6))
    compiled = torch.compile(fastsam.ops.self_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(**arguments, window=(2, 3)), fastsam.ops.self_attention(**arguments, window=(2, 3))
    )
