"""The equations of PredRNN, PredRNN++, MIM, MIM*, E3D-LSTM and TrajGRU, written naively.

Nothing here calls fastsam. Parameters come as the mapping of a cell's own names. Every gate is a line of its own, maps
are normalised by their definition, volumes are convolved plane by plane, and attention and warping materialise what
their formulas name. States are dictionaries; what is absent from one is zero.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Parameters = Mapping[str, Tensor]
State = dict[str, Tensor]
Step = Callable[..., tuple[Tensor, State]]


def below(parameters: Parameters, name: str) -> Parameters:
    """The parameters of the submodule called `name`."""
    prefix = f"{name}."
    return {key.removeprefix(prefix): value for key, value in parameters.items() if key.startswith(prefix)}


def normalise(parameters: Parameters, y: Tensor) -> Tensor:
    """(y - mean) / sqrt(variance + 1e-5) of a sample, scaled and shifted by channel; y itself without parameters."""
    if "weight" not in parameters:
        return y
    samples = y.flatten(1)
    mean = samples.mean(1).reshape(-1, *[1] * (y.ndim - 1))
    variance = samples.var(1, correction=0).reshape(-1, *[1] * (y.ndim - 1))
    shape = (-1, *[1] * (y.ndim - 2))
    return (y - mean) / (variance + 1e-5).sqrt() * parameters["weight"].reshape(shape) + parameters["bias"].reshape(
        shape
    )


def convolve(parameters: Parameters, name: str, x: Tensor, parts: int = 1) -> tuple[Tensor, ...]:
    """The convolution called `name` and its norm, cut into its gates."""
    own = below(parameters, name)
    weight, bias = own["weight"], own.get("bias")
    y = convolve_volume(x, weight, bias) if weight.ndim == 5 else convolve_map(x, weight, bias)
    return normalise(below(own, "norm"), y).chunk(parts, dim=1)


def convolve_map(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)


def convolve_volume(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Plane d is made of the planes from d - (K - 1) // 2 on, as many as the kernel is deep; none beyond the volume."""
    depth, first = x.shape[2], (weight.shape[2] - 1) // 2
    planes = []
    for d in range(depth):
        plane = convolve_map(0 * x[:, :, 0], weight[:, :, 0], bias)
        for k in range(weight.shape[2]):
            if 0 <= d + k - first < depth:
                plane = plane + convolve_map(x[:, :, d + k - first], weight[:, :, k], None)
        planes.append(plane)
    return torch.stack(planes, dim=2)


def st_lstm(p: Parameters, x: Tensor, state: State, forget_bias: float) -> tuple[Tensor, State]:
    """PredRNN, with a convolution of X for both memories, or one for each."""
    h, c, m = state["h"], state["c"], state["m"]
    i_h, f_h, g_h, o_h = convolve(p, "hidden", h, 4)
    if "output.weight" in p:
        i_x, f_x, g_x, i_x2, f_x2, g_x2, o_x = convolve(p, "input", x, 7)
        i_m, f_m, g_m = convolve(p, "memory", m, 3)
    else:
        i_x, f_x, g_x, o_x = convolve(p, "input", x, 4)
        i_x2, f_x2, g_x2 = i_x, f_x, g_x
        i_m, f_m, g_m, o_m = convolve(p, "memory", m, 4)
    c = torch.sigmoid(f_x + f_h + forget_bias) * c + torch.sigmoid(i_x + i_h) * torch.tanh(g_x + g_h)
    m = torch.sigmoid(f_x2 + f_m + forget_bias) * m + torch.sigmoid(i_x2 + i_m) * torch.tanh(g_x2 + g_m)
    both = torch.cat([c, m], dim=1)
    if "output.weight" in p:
        (o_m,) = convolve(p, "output", both)
    h = torch.sigmoid(o_x + o_h + o_m) * torch.tanh(convolve(p, "fusion", both)[0])
    return h, {"h": h, "c": c, "m": m}


def causal_memory(
    p: Parameters, of_x: tuple[Tensor, ...], c: Tensor, m: Tensor, forget_bias: float
) -> tuple[Tensor, Tensor]:
    """H_t and M_t of a causal LSTM, equation 1 from its third line on."""
    i_x, f_x, g_x, o_x = of_x
    i_c, f_c, g_c, o_c = convolve(p, "cell", c, 4)
    i_m, f_m, g_m, old = convolve(p, "memory", m, 4)
    g = torch.tanh(g_x + g_c + g_m)
    i = torch.sigmoid(i_x + i_c + i_m)
    f = torch.sigmoid(f_x + f_c + f_m + forget_bias)
    m = f * torch.tanh(old) + i * g
    o = torch.tanh(o_x + o_c + convolve(p, "output", m)[0])
    return o * torch.tanh(convolve(p, "fusion", torch.cat([c, m], dim=1))[0]), m


def causal_lstm(p: Parameters, x: Tensor, state: State, forget_bias: float) -> tuple[Tensor, State]:
    h, c, m = state["h"], state["c"], state["m"]
    i_x, f_x, g_x, *later = convolve(p, "input", x, 7)
    i_r, f_r, g_r = convolve(p, "recurrent", torch.cat([h, c], dim=1), 3)
    c = torch.sigmoid(f_x + f_r + forget_bias) * c + torch.sigmoid(i_x + i_r) * torch.tanh(g_x + g_r)
    h, m = causal_memory(p, tuple(later), c, m, forget_bias)
    return h, {"h": h, "c": c, "m": m}


def highway(p: Parameters, x: Tensor, state: State, forget_bias: float) -> tuple[Tensor, State]:
    """A causal LSTM, and equation 2 behind it, which makes the layer's output."""
    h, new = causal_lstm(below(p, "cell"), x, state, forget_bias)
    z = state["z"]
    p_gate, s_gate = convolve(below(p, "highway"), "gates", torch.cat([h, z], dim=1), 2)
    s = torch.sigmoid(s_gate)
    z = s * torch.tanh(p_gate) + (1 - s) * z
    return z, {**new, "z": z}


def peephole_lstm(p: Parameters, x: Tensor, h: Tensor, c: Tensor, forget_bias: float) -> tuple[Tensor, Tensor]:
    i_x, f_x, g_x, o_x = convolve(p, "input", x, 4)
    i_h, f_h, g_h, o_h = convolve(p, "hidden", h, 4)
    w_i, w_f = p["peephole"].chunk(2)
    i = torch.sigmoid(i_x + i_h + w_i * c)
    f = torch.sigmoid(f_x + f_h + w_f * c + forget_bias)
    c = f * c + i * torch.tanh(g_x + g_h)
    return torch.sigmoid(o_x + o_h + p["output_peephole"] * c) * torch.tanh(c), c


def forget(p: Parameters, state: State, difference: Tensor | None, forget_bias: float) -> tuple[Tensor, State]:
    """T_t, and the state with the new D, N and S."""
    d, n = state["d"], state["n"]
    if difference is not None:
        d, n = peephole_lstm(below(p, "non_stationary"), difference, d, n, forget_bias)
    t, s = peephole_lstm(below(p, "stationary"), d, state["c"], state["s"], forget_bias)
    return t, {"d": d, "n": n, "s": s}


def mim(p: Parameters, x: Tensor, state: State, forget_bias: float, difference: Tensor | None) -> tuple[Tensor, State]:
    h, m = state["h"], state["m"]
    t, new = forget(p, state, difference, forget_bias)
    i_x, f_x, g_x, o_x = convolve(p, "input", x, 4)
    i_h, g_h, o_h = convolve(p, "hidden", h, 3)
    i_m, f_m, g_m, o_m = convolve(p, "memory", m, 4)
    c = t + torch.sigmoid(i_x + i_h) * torch.tanh(g_x + g_h)
    m = torch.sigmoid(f_x + f_m + forget_bias) * m + torch.sigmoid(i_x + i_m) * torch.tanh(g_x + g_m)
    h = torch.sigmoid(o_x + o_h + o_m) * torch.tanh(convolve(p, "fusion", torch.cat([c, m], dim=1))[0])
    return h, {"h": h, "c": c, "m": m, **new}


def causal_mim(
    p: Parameters, x: Tensor, state: State, forget_bias: float, difference: Tensor | None
) -> tuple[Tensor, State]:
    t, new = forget(p, state, difference, forget_bias)
    i_x, g_x, *later = convolve(p, "input", x, 6)
    i_h, g_h = convolve(p, "hidden", state["h"], 2)
    c = t + torch.sigmoid(i_x + i_h) * torch.tanh(g_x + g_h)
    h, m = causal_memory(p, tuple(later), c, state["m"], forget_bias)
    return h, {"h": h, "c": c, "m": m, **new}


def recall(query: Tensor, memories: list[Tensor]) -> Tensor:
    """softmax(R C^T) C over all positions of all memories."""
    tokens = torch.cat([memory.flatten(2) for memory in memories], dim=2)
    scores = torch.einsum("bcq,bck->bqk", query.flatten(2), tokens)
    return torch.einsum("bqk,bck->bcq", torch.softmax(scores, dim=2), tokens).reshape(query.shape)


def e3d_lstm(
    p: Parameters, x: Tensor, state: State, forget_bias: float, memories: list[Tensor]
) -> tuple[Tensor, State]:
    """One E3D-LSTM; `memories` are the cell states to recall."""
    h, c, m = state["h"], state["c"], state["m"]
    i_x, g_x, r_x, i_x2, f_x2, g_x2, o_x = convolve(p, "input", x, 7)
    i_h, g_h, r_h, o_h = convolve(p, "hidden", h, 4)
    i_m, f_m, g_m, old = convolve(p, "memory", m, 4)
    recalled = recall(torch.sigmoid(r_x + r_h), memories)
    c = torch.sigmoid(i_x + i_h) * torch.tanh(g_x + g_h) + normalise(below(p, "state_norm"), c + recalled)
    m = torch.sigmoid(i_x2 + i_m) * torch.tanh(g_x2 + g_m) + torch.sigmoid(f_x2 + f_m + forget_bias) * torch.tanh(old)
    both = torch.cat([c, m], dim=1)
    h = torch.sigmoid(o_x + o_h + convolve(p, "output", both)[0]) * torch.tanh(convolve(p, "fusion", both)[0])
    return h, {"h": h, "c": c, "m": m}


def warp(h: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """sum_mn H[m, n] max(0, 1 - |i + V[i, j] - m|) max(0, 1 - |j + U[i, j] - n|) at every position i, j."""
    height, width = h.shape[2:]
    rows, columns = torch.arange(height, dtype=h.dtype), torch.arange(width, dtype=h.dtype)
    from_row = (1 - (v[..., None] + rows[:, None, None] - rows).abs()).clamp(min=0)
    from_column = (1 - (u[..., None] + columns[None, :, None] - columns).abs()).clamp(min=0)
    return torch.einsum("bcmn,bijm,bijn->bcij", h, from_row, from_column)


def traj_gru(p: Parameters, x: Tensor, state: State, links: int) -> tuple[Tensor, State]:
    h = state["h"]
    flow = F.leaky_relu(convolve(p, "input_flow", x)[0] + convolve(p, "hidden_flow", h)[0], 0.2)
    flows = convolve(p, "flow", flow)[0]
    of_x = convolve(p, "input", x, 3)
    weights = p["warped.weight"].unflatten(1, (-1, links))
    of_h = p["warped.bias"].reshape(-1, 1, 1)
    for link in range(links):
        moved = warp(h, flows[:, link], flows[:, links + link])
        of_h = of_h + convolve_map(moved, weights[:, :, link], None)
    z_h, r_h, new_h = of_h.chunk(3, dim=1)
    z, r = torch.sigmoid(of_x[0] + z_h), torch.sigmoid(of_x[1] + r_h)
    h = (1 - z) * F.leaky_relu(of_x[2] + r * new_h, 0.2) + z * h
    return h, {"h": h}


def patches(frame: Tensor, p: int) -> Tensor:
    """The pixels of every patch as channels, row by row, zeros beyond the bottom and the right."""
    frame = F.pad(frame, (0, -frame.shape[3] % p, 0, -frame.shape[2] % p))
    return torch.cat([frame[:, :, row::p, column::p] for row in range(p) for column in range(p)], dim=1)


def pixels(maps: Tensor, p: int, size: tuple[int, int]) -> Tensor:
    """The inverse of `patches`, cropped to the size of the frame."""
    batch, channels, rows, columns = maps.shape
    frame = maps.new_zeros(batch, channels // p**2, rows * p, columns * p)
    for index, part in enumerate(maps.chunk(p * p, dim=1)):
        frame[:, :, index // p :: p, index % p :: p] = part
    return frame[:, :, : size[0], : size[1]]


def forecast(parameters: Parameters, frames: Tensor, horizon: int, patch_size: int, stack: Callable) -> Tensor:
    """The predictions after `frames`; stack(x, step, states) is the last layer's output, and changes the states."""
    states: dict = {}
    predictions: list[Tensor] = []
    for step in range(frames.shape[1] + horizon - 1):
        frame = frames[:, step] if step < frames.shape[1] else predictions[-1]
        h = stack(patches(frame, patch_size), step, states)
        (made,) = convolve(parameters, "output", h)
        predictions.append(pixels(made, patch_size, (frames.shape[3], frames.shape[4])))
    return torch.stack(predictions[frames.shape[1] - 1 :], dim=1)


def zeros(x: Tensor, channels: int, *fields: str) -> State:
    return dict.fromkeys(fields, x.new_zeros(x.shape[0], channels, *x.shape[2:]))


def zigzag(steps: list[Step], sizes: list[int], fields: str = "hcm") -> Callable:
    """Layers whose memory goes up, and from the last to the first of the next step; Z is the first layer's alone."""

    def stack(x: Tensor, step: int, states: dict) -> Tensor:
        for layer, advance in enumerate(steps):
            state = states.get(layer) or zeros(x, sizes[layer], *fields)
            memory = states.get("memory")
            state = {**state, "m": zeros(x, sizes[-1], "m")["m"] if memory is None else memory}
            x, states[layer] = advance(x, state)
            states["memory"] = states[layer]["m"]
        return x

    return stack


def plain(steps: list[Step], sizes: list[int]) -> Callable:
    """Layers with a hidden state each."""

    def stack(x: Tensor, step: int, states: dict) -> Tensor:
        for layer, advance in enumerate(steps):
            x, states[layer] = advance(x, states.get(layer) or zeros(x, sizes[layer], "h"))
        return x

    return stack


def mim_stack(steps: list[Step], channels: int) -> Callable:
    """The first layer, and MIM blocks: the second reads how the first has changed, the others the D below."""

    def stack(x: Tensor, step: int, states: dict) -> Tensor:
        difference = None
        for layer, advance in enumerate(steps):
            state = states.get(layer) or zeros(x, channels, *"hcmdns")
            state = {**state, "m": states.get("memory", state["m"])}
            if layer == 0:
                x, new = advance(x, state)
                difference = new["h"] - state["h"] if step > 0 else None
            else:
                x, new = advance(x, state, difference)
                difference = new["d"] if step > 0 else None
            states[layer], states["memory"] = new, new["m"]
        return x

    return stack


def e3d_stack(steps: list[Step], channels: int, depth: int, remembered: int | None) -> Callable:
    """The first layer reads the last `depth` frames; every layer recalls its last `remembered` cell states."""

    def stack(x: Tensor, step: int, states: dict) -> Tensor:
        frames = states.setdefault("frames", [torch.zeros_like(x)] * depth)
        frames.append(x)
        x = torch.stack(frames[-depth:], dim=2)
        for layer, advance in enumerate(steps):
            state = states.get(layer) or zeros(x, channels, *"hcm")
            state = {**state, "m": states.get("memory", state["m"])}
            memories = states.setdefault(f"cells {layer}", [state["c"]])
            x, new = advance(x, state, memories if remembered is None else memories[-remembered:])
            memories.append(new["c"])
            states[layer], states["memory"] = new, new["m"]
        return x.flatten(1, 2)

    return stack
