"""Checkpoints of the published code of CMS-LSTM."""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fastsam.modules import _check

_CELL = {
    "conv_i2h.0": "cell.input_conv",
    "conv_i2h.1": "cell.input_norm",
    "conv_h2h.0": "cell.hidden_conv",
    "conv_h2h.1": "cell.hidden_norm",
    "norm_cell": "cell.state_norm",
    "convQ.0": "context.input_gate",
    "convQ.1": "context.input_gate_norm",
    "convR.0": "context.hidden_gate",
    "convR.1": "context.hidden_gate_norm",
    "SEBlock.conv_bn.0": "expression.merge",
    "SEBlock.conv_bn.1": "expression.merge_norm",
    "SEBlock.w_z": "expression.fusion",
    "SEBlock.w_z2h.0": "expression.fused_gates",
    "SEBlock.w_z2h.1": "expression.fused_norm",
    "SEBlock.w_h2h.0": "expression.hidden_gates",
    "SEBlock.w_h2h.1": "expression.hidden_norm",
    "SEBlock.norm_mem": "expression.state_norm",
}
"""The submodules of a cell: their published names, and those of `CMSLSTMCell`."""

_ATTENTION = {"f_query": "query", "f_key": "key", "f_value": "value"}

_WITHOUT_BIAS = ("conv_i2h.0", "conv_h2h.0", "convQ.0", "convR.0", "SEBlock.w_z2h.0", "SEBlock.w_h2h.0")


def cms_lstm(state_dict: Mapping[str, Tensor], *, patch_size: int = 4) -> dict[str, Tensor]:
    """A state dict of the published CMS-LSTM as one of `fastsam.CMSLSTM`.

    The channels of embedding and output are brought from the published order of a patch's pixels, (channel, column,
    row), to that of `fastsam.modules.patchify`, (row, column, channel). The unused `gamma` of every scale is dropped,
    if there is one; the one of the result is zero. Tensors that need no permutation are not copied.

    Args:
        state_dict: what the published model's `state_dict()` returns; its checkpoint files hold it as "state_dict". The
            names may begin with "module.", as those of a model in DataParallel do.
        patch_size: p of the published model.

    Returns:
        The state dict for a `fastsam.CMSLSTM` with as many layers and scales, the same kernel_size and frame_size.

    Raises:
        TypeError, ValueError: an argument is not of the kind given above; entries are missing or not recognised, or the
            shapes of the embedding or the output do not fit patch_size.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"cms_lstm: state_dict must be a mapping of names to tensors, got {type(state_dict).__name__}")
    _check.positive_int("cms_lstm", "patch_size", patch_size)
    if all(str(name).startswith("module.") for name in state_dict):
        state_dict = {name.removeprefix("module."): value for name, value in state_dict.items()}
    names = _names(_indices(state_dict, r"lstm\.(\d+)\."), _indices(state_dict, r"lstm\.\d+\.SEBlock\.stages\.(\d+)\."))
    _check_names(state_dict, names)
    converted = {new: state_dict[old] for old, new in names.items()}
    for name, dim in (("embedding.weight", 1), ("output.weight", 0), ("output.bias", 0)):
        converted[name] = _pixels_reordered(name, converted[name], dim, patch_size)
    for name in [name for name in converted if name.endswith(".value.bias")]:
        converted[name.replace("value.bias", "gamma")] = torch.zeros_like(converted[name][:1])
    return converted


def _indices(state_dict: Mapping[str, Tensor], pattern: str) -> range:
    """0 up to the highest index that the pattern finds in a name; 0 at least."""
    found = [int(match[1]) for name in state_dict if (match := re.match(pattern, name))]
    return range(max(found, default=0) + 1)


def _names(layers: Iterable[int], scales: Iterable[int]) -> dict[str, str]:
    """Every entry that is needed, but for the gammas: its published name, and the one it gets."""
    names = {"embed": "embedding", "output": "output"}
    for layer in layers:
        names |= {f"lstm.{layer}.{old}": f"cells.{layer}.{new}" for old, new in _CELL.items()}
        for scale in scales:
            stage, attention = f"lstm.{layer}.SEBlock.stages.{scale}", f"cells.{layer}.expression.attentions.{scale}"
            names |= {f"{stage}.{old}": f"{attention}.{new}" for old, new in _ATTENTION.items()}
    weights = {f"{old}.weight": f"{new}.weight" for old, new in names.items()}
    biases = {f"{old}.bias": f"{new}.bias" for old, new in names.items() if not old.endswith(_WITHOUT_BIAS)}
    return weights | biases


def _check_names(state_dict: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
    missing = [name for name in names if name not in state_dict]
    unknown = [name for name in state_dict if name not in names and not name.endswith(".gamma")]
    if missing or unknown:
        found = [
            f"{what} {', '.join(of[:5])}" + (f" and {len(of) - 5} more" if len(of) > 5 else "")
            for what, of in (("missing are", missing), ("not recognised are", unknown))
            if of
        ]
        hint = '; give the "state_dict" that the file holds' if "state_dict" in unknown else ""
        raise ValueError(f"cms_lstm: state_dict must be one of the published CMS-LSTM; {'; '.join(found)}{hint}")


def _pixels_reordered(name: str, value: Tensor, dim: int, p: int) -> Tensor:
    """(channel, column, row) -> (row, column, channel) along one dimension."""
    if value.shape[dim] % p**2:
        raise ValueError(
            f"cms_lstm: the size of {name} {tuple(value.shape)} in dimension {dim} must be a multiple of "
            f"patch_size**2 = {p**2}"
        )
    return value.unflatten(dim, (-1, p, p)).transpose(dim, dim + 2).flatten(dim, dim + 2)
