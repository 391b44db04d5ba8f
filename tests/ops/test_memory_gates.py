"""`memory_gates` as the second half of `separable_gates`, and gates that saturate."""

import cases
import torch
import torch.nn.functional as F

import fastsam


def test_is_separable_gates_after_its_convolutions(backend_name):
    arguments = cases.separable_gates(3, 7, (6, 5), kernel=5)
    u = torch.cat([arguments["z"], arguments["h"]], dim=1)
    u = F.conv2d(u, arguments["depthwise"], padding=2, groups=u.shape[1])
    gates = F.conv2d(u, arguments["pointwise"], arguments["bias"])
    actual = fastsam.ops.memory_gates(gates, arguments["m"])
    torch.testing.assert_close(actual, fastsam.ops.separable_gates(**arguments), rtol=1e-11, atol=1e-12)


def test_saturated_gates(backend_name):
    """Gates of +-1e3: keeps or replaces, and hides, exactly, and its gradients are finite."""
    arguments = cases.memory_gates()
    gates = (1000 * arguments["gates"].sign()).requires_grad_()
    h_hat, m_new = fastsam.ops.memory_gates(gates, arguments["m"])
    i, g, o = gates.detach().sign().chunk(3, dim=1)
    expected = torch.where(i > 0, g, arguments["m"])
    torch.testing.assert_close(m_new, expected)
    torch.testing.assert_close(h_hat, (o > 0) * expected)
    (h_hat.sum() + m_new.sum()).backward()
    assert gates.grad.isfinite().all()
