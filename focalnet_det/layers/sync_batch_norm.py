"""Batch norm over the batches of all processes, on any device."""

import torch
from torch import Tensor, distributed, nn
from torch.distributed.nn.functional import all_reduce


class SyncBatchNorm(nn.SyncBatchNorm):
    """``nn.SyncBatchNorm``, which also trains on the CPU; in one process it is ``BatchNorm2d``.

    On the CPU, processes share sums over pixels, so that batches and images may differ in size.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        shared = self.training and distributed.is_available() and distributed.is_initialized()
        if not shared or x.is_cuda:
            return super().forward(x)
        return self._forward_on_cpu(x)

    def _forward_on_cpu(self, x: Tensor) -> Tensor:
        x32 = x.float()
        count = x32.new_tensor([x.numel() / x.shape[1]])
        sums = torch.cat([x32.sum(dim=(0, 2, 3)), x32.square().sum(dim=(0, 2, 3)), count])
        total, total_square, number = all_reduce(sums).split([x.shape[1], x.shape[1], 1])
        mean = total / number
        variance = (total_square / number - mean.square()).clamp(min=0)
        with torch.no_grad():
            self._update_running(mean, variance * number / (number - 1).clamp(min=1))
        scale = self.weight * torch.rsqrt(variance + self.eps)
        shift = self.bias - mean * scale
        return (x32 * scale[:, None, None] + shift[:, None, None]).to(x.dtype)

    def _update_running(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)
