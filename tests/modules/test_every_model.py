"""What holds for every model by name: it learns, compiles, runs in bfloat16, and is restored from what is kept."""

import pickle
from collections.abc import Iterator

import pytest
import torch
from small_models import FRAME, forecast_and_gradients, small
from torch import Tensor, nn

import fastsam

STEPS, BATCH, READ, HORIZON, SIZE = 30, 4, 2, 1, (32, 32)
"""Of training: iterations, sequences of each, frames that are read and predicted, and their size."""


@pytest.fixture(scope="module")
def batches() -> list[Tensor]:
    """MovingMNIST, (BATCH, READ + HORIZON, 1, *SIZE) for each iteration, of the digits that scikit-learn brings."""
    for package in ("jsonargparse", "lightning", "numpy", "pooch", "skimage", "sklearn"):
        pytest.importorskip(package)
    from training.digits import embedded_digits
    from training.moving_mnist import TRAIN, MovingMNIST

    frames = READ + HORIZON
    sequences = MovingMNIST(
        embedded_digits().train, STEPS * BATCH, seed=0, stream=TRAIN, frames=frames, size=SIZE[0], count=1
    )
    return list(torch.stack([sequences[index] for index in range(len(sequences))]).split(BATCH))


@pytest.mark.parametrize("name", fastsam.MODELS)
def test_training_lowers_the_loss(name: str, batches: list[Tensor]) -> None:
    """On sequences it has not seen before, to well below what the best grey frame has."""
    model = small(name, SIZE, hidden_channels=(16, 16), patch_size=8)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for batch in batches:
        loss = (model(batch[:, :READ], HORIZON) - batch[:, READ:]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    first, last = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
    grey = torch.stack(batches[-5:])[:, :, READ:].var(correction=0).item()
    assert last < 0.6 * first and last < 0.8 * grey, f"{first:.4f} to {last:.4f}, a grey frame {grey:.4f}"


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("name", fastsam.MODELS)
def test_compiles_into_one_graph(name: str, fresh_compiler: None) -> None:
    """Two steps, so that states are in it, of as few layers as the model can have, since compiling takes seconds."""
    layers = (4, 4) if name.startswith("mim") else (4,)
    model = small(name, hidden_channels=layers, dtype=torch.float64)
    frames = torch.rand(2, 2, 1, *FRAME, dtype=torch.float64)
    expected = forecast_and_gradients(model, frames)
    model.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(forecast_and_gradients(model, frames), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", fastsam.MODELS)
def test_autocast_to_bfloat16_stays_near(name: str) -> None:
    model, frames = small(name), torch.rand(2, 2, 1, *FRAME)
    expected = forecast_and_gradients(model, frames)
    with torch.autocast("cpu", torch.bfloat16):
        actual = forecast_and_gradients(model, frames)
    small_part = 0.005 * max(value.norm() for key, value in expected.items() if key != "forecast")
    limits = {"forecast": (0.04, 0.0), "frames": (0.1, 0.0)}
    for key, value in expected.items():
        relative, absolute = limits.get(key, (0.1, small_part))
        error, allowed = (actual[key].float() - value).norm(), relative * value.norm() + absolute
        assert error < allowed, f"{key}: {error:.1e}, at most {allowed:.1e}"  # not so where it is no number


@pytest.mark.parametrize("name", fastsam.MODELS)
def test_state_dict_and_pickle_restore_it(name: str) -> None:
    model, frames = small(name), torch.rand(2, 2, 1, *FRAME)
    restored = small(name)
    for parameter in restored.parameters():
        nn.init.normal_(parameter)
    restored.load_state_dict(model.state_dict())
    for other in (restored, pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(frames, 2), model(frames, 2), rtol=0, atol=0)
