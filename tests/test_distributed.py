"""Data-parallel training in two processes: every parameter has a gradient in every step, all ranks the same one."""

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from extension import require_native
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastsam

RANKS = 2


def _sam() -> tuple[nn.Module, list[tuple[Tensor, ...]]]:
    generator = torch.Generator().manual_seed(1)
    batches = [tuple(torch.randn(4, 6, 4, 5, generator=generator) for _ in range(2)) for _ in range(2)]
    return fastsam.SAM(6, 4, 3), batches


def _model(model_class: type[nn.Module]) -> tuple[nn.Module, list[tuple[Any, ...]]]:
    generator = torch.Generator().manual_seed(1)
    batches = [(torch.rand(4, 3, 1, 8, 8, generator=generator), 2) for _ in range(2)]
    model = model_class(hidden_channels=(6, 6), embed_channels=4, kernel_size=3, patch_size=2, attention_channels=4)
    return model, batches


def _make(name: str) -> tuple[nn.Module, list[tuple[Any, ...]]]:
    torch.manual_seed(0)
    return _sam() if name == "SAM" else _model(getattr(fastsam, name))


def _train(module: nn.Module, batches: list[tuple[Any, ...]]) -> dict[str, Tensor]:
    """Two steps of SGD; the last gradients, by name."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for batch in batches:
        optimizer.zero_grad()
        outputs = module(*batch)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        sum(output.square().mean() for output in outputs).backward()
        optimizer.step()
    named = {name.removeprefix("module."): parameter for name, parameter in module.named_parameters()}
    missing = [name for name, parameter in named.items() if parameter.grad is None]
    assert not missing, f"no gradient for {missing}"
    return {name: parameter.grad.clone() for name, parameter in named.items()}


def _worker(rank: int, folder: str, backend: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
    try:
        with fastsam.backend(backend):
            results = {}
            for name in names:
                module, batches = _make(name)
                # find_unused_parameters=False: a parameter without a gradient is an error at the second step
                parallel = DistributedDataParallel(module, find_unused_parameters=False)
                mine = [tuple(x[rank::RANKS] if isinstance(x, Tensor) else x for x in batch) for batch in batches]
                results[name] = _train(parallel, mine)
        torch.save(results, os.path.join(folder, f"rank{rank}.pt"))
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this PyTorch has no gloo")
@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_two_processes_train_as_one(backend: str, tmp_path: Path) -> None:
    if backend == "cpu":
        require_native()
    names = ["SAM", "SAConvLSTM", "BaseModel"] if backend == "cpu" else ["SAM"]
    torch.multiprocessing.spawn(_worker, (str(tmp_path), backend, names), nprocs=RANKS)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(RANKS)]
    for name in names:
        module, batches = _make(name)
        with fastsam.backend(backend):
            alone = _train(module, batches)
        assert alone.keys() == ranks[0][name].keys()
        for parameter, expected in alone.items():
            first, second = (rank[name][parameter] for rank in ranks)
            assert torch.equal(first, second), f"{name}.{parameter} differs between ranks"
            torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-6, msg=f"{name}.{parameter}")
