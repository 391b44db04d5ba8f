"""Self-attention memories as other people published them: their parameters' names and arithmetic, written naively.

Every class builds its convolutions under the published names and computes, through whole attention matrices, what the
published module computes; nothing here calls fastsam.
"""

import torch
from torch import Tensor, nn


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Every position's mean of the values, weighted by the softmax over the keys of its query's products with them."""
    products = torch.einsum("bdhw,bdyx->bhwyx", query, key)
    weights = products.flatten(3).softmax(dim=3).unflatten(3, key.shape[2:])
    return torch.einsum("bhwyx,bcyx->bchw", weights, value)


def blend(i: Tensor, g: Tensor, o: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """h and m from the gates before their activations."""
    new = torch.sigmoid(i) * torch.tanh(g) + (1 - torch.sigmoid(i)) * m
    return torch.sigmoid(o) * new, new


class WithLayersK2V2(nn.Module):
    """hyona-yu/SA-convlstm (`self_attention_memory_module`) and its forks."""

    def __init__(self, input_dim: int, hidden_dim: int, bias: bool = True) -> None:
        super().__init__()
        for name in ("layer_q", "layer_k", "layer_k2"):
            self.add_module(name, nn.Conv2d(input_dim, hidden_dim, 1, bias=bias))
        for name in ("layer_v", "layer_v2"):
            self.add_module(name, nn.Conv2d(input_dim, input_dim, 1, bias=bias))
        self.layer_z = nn.Conv2d(2 * input_dim, 2 * input_dim, 1, bias=bias)
        self.layer_m = nn.Conv2d(3 * input_dim, 3 * input_dim, 1, bias=bias)

    def gates(self, h: Tensor, m: Tensor) -> tuple[Tensor, ...]:
        query = self.layer_q(h)
        attended_h = attend(query, self.layer_k(h), self.layer_v(h))
        attended_m = attend(query, self.layer_k2(m), self.layer_v2(m))
        z = self.layer_z(torch.cat([attended_h, attended_m], dim=1))
        return self.layer_m(torch.cat([z, h], dim=1)).chunk(3, dim=1)

    def forward(self, h: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        o, g, i = self.gates(h, m)
        return blend(i, g, o, m)


class WithGatesInAnotherOrder(WithLayersK2V2):
    """The parameters of the published module, but the gates in the order i, g, o."""

    def forward(self, h: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        return blend(*self.gates(h, m), m)


class WithLayersQhVm(nn.Module):
    """johnjaejunlee95/SA_ConvLSTM (`SA_Memory_Module`), where value_dim is hidden_dim."""

    def __init__(self, input_dim: int, hidden_dim: int, value_dim: int | None = None) -> None:
        super().__init__()
        value_dim = hidden_dim if value_dim is None else value_dim
        for name in ("layer_qh", "layer_kh", "layer_km"):
            self.add_module(name, nn.Conv2d(input_dim, hidden_dim, 1))
        for name in ("layer_vh", "layer_vm"):
            self.add_module(name, nn.Conv2d(input_dim, value_dim, 1))
        self.layer_z = nn.Conv2d(2 * value_dim, 2 * value_dim, 1)
        self.layer_m = nn.Conv2d(2 * value_dim + input_dim, 3 * input_dim, 1)

    def forward(self, h: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        query = self.layer_qh(h)
        attended_h = attend(query, self.layer_kh(h), self.layer_vh(h))
        attended_m = attend(query, self.layer_km(m), self.layer_vm(m))
        z = self.layer_z(torch.cat([attended_h, attended_m], dim=1))
        o, g, i = self.layer_m(torch.cat([z, h], dim=1)).chunk(3, dim=1)
        return blend(i, g, o, m)


class WithConvolutionsAfterAttention(nn.Module):
    """tsugumi-sys/SA-ConvLSTM-Pytorch (`SelfAttentionMemory`), which returns an attention map too."""

    def __init__(self, input_dim: int, hidden_dim: int) -> None:
        super().__init__()
        for name in ("query_h", "key_h", "key_m"):
            self.add_module(name, nn.Conv2d(input_dim, hidden_dim, 1))
        for name in ("value_h", "z_h", "value_m", "z_m"):
            self.add_module(name, nn.Conv2d(input_dim, input_dim, 1))
        self.w_z = nn.Conv2d(2 * input_dim, 2 * input_dim, 1)
        self.w = nn.Conv2d(3 * input_dim, 3 * input_dim, 1)

    def forward(self, h: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key = self.query_h(h), self.key_h(h)
        attended_h = self.z_h(attend(query, key, self.value_h(h)))
        attended_m = self.z_m(attend(query, self.key_m(m), self.value_m(m)))
        z = self.w_z(torch.cat([attended_h, attended_m], dim=1))
        attention = (query.flatten(2).mT @ key.flatten(2)).softmax(dim=2)
        return *blend(*self.w(torch.cat([z, h], dim=1)).chunk(3, dim=1), m), attention


class WithStackedProjections(nn.Module):
    """jerrywn121/TianChi_AIEarth (`SAAttnMem`): scaled scores, and gates by a dense convolution."""

    def __init__(self, input_dim: int, d_model: int, kernel_size: int | tuple[int, int]) -> None:
        super().__init__()
        self.d_model = d_model
        self.conv_h = nn.Conv2d(input_dim, 3 * d_model, 1)
        self.conv_m = nn.Conv2d(input_dim, 2 * d_model, 1)
        self.conv_z = nn.Conv2d(2 * d_model, d_model, 1)
        self.conv_output = nn.Conv2d(d_model + input_dim, 3 * input_dim, kernel_size, padding="same")

    def forward(self, h: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        query, key, value = self.conv_h(h).chunk(3, dim=1)
        memory_key, memory_value = self.conv_m(m).chunk(2, dim=1)
        query = query / self.d_model**0.5
        attended = [attend(query, key, value), attend(query, memory_key, memory_value)]
        z = self.conv_z(torch.cat(attended, dim=1))
        return blend(*self.conv_output(torch.cat([z, h], dim=1)).chunk(3, dim=1), m)
