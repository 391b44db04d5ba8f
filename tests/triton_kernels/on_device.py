"""Where the tests of the Triton kernels run: on a card where there is one, else interpreted, on the CPU."""

from typing import Any

import cases
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def moved(arguments: cases.Arguments) -> cases.Arguments:
    """The same arguments on DEVICE."""
    return cases.map_tensors(lambda tensor: tensor.to(DEVICE), arguments)


def make(operator: str, **options: Any) -> cases.Arguments:
    """Arguments of an operator, see `cases`, on DEVICE."""
    return moved(cases.make(operator, **options))
