"""Batch norm of one and of two processes against plain BatchNorm2d."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn

from focalnet_det.layers.sync_batch_norm import DistributedBatchNorm, sync_batch_norm
from tests.helpers.processes import in_two_processes

# What two processes hold: different numbers of images, of different sizes.
SIZES = ((3, 4, 5, 6), (1, 4, 3, 7))


def inputs() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(size) * 2 + 3 for size in SIZES]


def layer() -> DistributedBatchNorm:
    torch.manual_seed(1)
    norm = DistributedBatchNorm(4)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)
    return norm


def as_columns(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (1, C, 1, N * H * W)."""
    return x.transpose(0, 1).reshape(1, x.shape[1], 1, -1)


def test_one_process_is_batch_norm() -> None:
    own = layer()
    plain = nn.BatchNorm2d(4)
    plain.load_state_dict(own.state_dict())
    for x in inputs():
        torch.testing.assert_close(own(x), plain(x), rtol=0, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(own.buffers(), plain.buffers(), strict=True))
    torch.testing.assert_close(own.eval()(x), plain.eval()(x), rtol=0, atol=0)


def work(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    try:
        norm = layer()
        x = inputs()[rank].requires_grad_()
        y = norm(x)
        (y * torch.arange(y.numel()).view_as(y).sin()).sum().backward()
        state = {name: value.detach() for name, value in norm.state_dict().items()}
        grads = {name: p.grad for name, p in norm.named_parameters()}
        torch.save((y.detach(), x.grad, state, grads), Path(folder) / f"{rank}.pt")
    finally:
        distributed.destroy_process_group()


def test_two_processes_are_one_batch(tmp_path: Path) -> None:
    in_two_processes("tests.layers.test_sync_batch_norm", "work", tmp_path)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]

    plain = nn.BatchNorm2d(4)
    plain.load_state_dict(copy.deepcopy(layer().state_dict()))
    xs = [x.requires_grad_() for x in inputs()]
    y = plain(torch.cat([as_columns(x) for x in xs], dim=-1))
    weights = [torch.arange(x.numel()).view_as(x).sin() for x in xs]
    (y * torch.cat([as_columns(w) for w in weights], dim=-1)).sum().backward()

    counts = [x.shape[0] * x.shape[2] * x.shape[3] for x in xs]
    for (own, grad, state, _), x, expected in zip(results, xs, y.split(counts, -1), strict=True):
        torch.testing.assert_close(as_columns(own), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grad, x.grad, rtol=1e-4, atol=1e-5)
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-6)
    for name, parameter in plain.named_parameters():
        total = results[0][3][name] + results[1][3][name]
        torch.testing.assert_close(total, parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("gpu", "kind"), [(True, nn.SyncBatchNorm), (False, DistributedBatchNorm)])
def test_kind_is_that_of_the_machine(
    gpu: bool, kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    norm = sync_batch_norm(4)
    assert type(norm) is kind
    assert list(norm.state_dict()) == list(nn.BatchNorm2d(4).state_dict())
