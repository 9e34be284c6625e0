"""Apply batch norm over the batches of all processes, on any device."""

import torch
from torch import Tensor, distributed, nn
from torch.distributed.nn.functional import all_reduce


def sync_batch_norm(channels: int) -> nn.Module:
    """Create ``nn.SyncBatchNorm`` if there is a GPU, else :class:`DistributedBatchNorm`.

    In a single process, both compute what ``BatchNorm2d`` does; their parameters and buffers have
    the same names. DistributedDataParallel refuses models with ``nn.SyncBatchNorm`` on CPUs.
    """
    return (nn.SyncBatchNorm if torch.cuda.is_available() else DistributedBatchNorm)(channels)


class DistributedBatchNorm(nn.BatchNorm2d):
    """Batch norm over all processes, on any device.

    Processes reduce sums over pixels, so their batches and images may differ in size.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (N, C, H, W) by the statistics of all processes."""
        if not (self.training and distributed.is_available() and distributed.is_initialized()):
            return super().forward(x)
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
