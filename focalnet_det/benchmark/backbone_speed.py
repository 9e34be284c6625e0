"""Compare time and memory of backbones with interleaved runs in one process."""

import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ..analysis.flops import analyze_backbone
from ..backbones.stages import Stage, StagedBackbone
from ..ops.focal_block import policy
from .contenders import Contender

# Largest relative difference of the last feature map between equivalent networks.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-1, torch.float16: 2e-2}


# Seconds; networks with longer runs are warmed up only once, see `compare`.
LONG_RUN = 10.0


@dataclass(frozen=True)
class Timing:
    """Time per call and memory of a contender.

    Attributes:
        name: of the contender.
        seconds: of each repeat.
        saved_bytes: tensors that autograd saves besides the parameters; None in inference.
        peak_bytes: of the device's allocator; None on CPUs.
        difference: relative difference of the output to the first contender; None if the weights
            differ.
    """

    name: str
    seconds: tuple[float, ...]
    saved_bytes: int | None
    peak_bytes: int | None
    difference: float | None

    @property
    def median(self) -> float:
        """Median time, seconds."""
        return statistics.median(self.seconds)

    def ratio(self, other: "Timing") -> tuple[float, float, float]:
        """Return the speed-up over ``other``: median, minimum and maximum over the repeats."""
        ratios = [b / a for a, b in zip(self.seconds, other.seconds, strict=True)]
        return statistics.median(ratios), min(ratios), max(ratios)


def compare(
    contenders: Sequence[Contender],
    images: Tensor,
    *,
    training: bool,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Timing]:
    """Time forward passes or training steps (forward and backward) of networks, interleaved.

    Each timed run follows an untimed one of the same network, so that caches and the allocator are
    in the state of continuous use. Networks whose runs take longer than :data:`LONG_RUN` seconds
    are warmed up only once.

    Args:
        contenders: the first is the baseline.
        images: (N, 3, H, W); dtype and device are those of the networks.
        training: time a step, with the mean of squares as loss, instead of a forward pass.
        repeats: timed runs of each contender.
        clock: returns seconds. ``time.process_time`` excludes other programs on a busy machine, but
            not their effect on caches; it sums over threads.
    Raises: ValueError if the output of an equivalent contender differs from the first.
    """
    differences = _differences(contenders, images)
    saved = [_saved_bytes(c, images) if training else None for c in contenders]
    seconds: list[list[float]] = [[] for _ in contenders]
    peaks: list[int | None] = [None] * len(contenders)
    for _ in range(repeats):
        for i, contender in enumerate(contenders):
            if images.is_cuda:
                torch.cuda.reset_peak_memory_stats()
            warm_up = not seconds[i] or seconds[i][-1] < LONG_RUN
            seconds[i].append(_time_once(contender, images, training, clock, warm_up=warm_up))
            peaks[i] = torch.cuda.max_memory_allocated() if images.is_cuda else None
    return [
        Timing(contender.name, tuple(times), saved_bytes, peak, difference)
        for contender, times, saved_bytes, peak, difference in zip(
            contenders, seconds, saved, peaks, differences, strict=True
        )
    ]


def _time_once(
    contender: Contender,
    images: Tensor,
    training: bool,
    clock: Callable[[], float],
    *,
    warm_up: bool,
) -> float:
    run = _runner(contender, images, training)
    with policy.force_backend(contender.path):
        if warm_up:
            run()
            _wait(images)
        start = clock()
        run()
        _wait(images)
        return clock() - start


def process_peak_bytes() -> int:
    """Return the peak memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass(frozen=True)
class Ceilings:
    """Measured peaks of the machine: multiply-accumulates and bytes per second."""

    macs: float
    bytes: float


def measure_ceilings(dtype: torch.dtype, device: torch.device) -> Ceilings:
    """Measure a square matrix product and a copy, best of several runs."""
    size = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = _best(lambda: torch.mm(a, b), a)
    source = torch.empty(2**27 if device.type == "cpu" else 2**31, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    copy = _best(lambda: target.copy_(source), a)
    return Ceilings(macs=size**3 / product, bytes=2 * source.numel() / copy)


@dataclass(frozen=True)
class StageTiming:
    """Time of a stage in inference relative to the roofline.

    Attributes:
        name: of the stage.
        seconds: median time of its blocks, without downsampling.
        macs: multiply-accumulates of its blocks.
        least_bytes: minimal traffic: input and output of every block, and the weights.
        floor: lower bound of the time, seconds: the maximum of compute and traffic.
    """

    name: str
    seconds: float
    macs: int
    least_bytes: int
    floor: float


def roofline(
    net: StagedBackbone, images: Tensor, ceilings: Ceilings, repeats: int
) -> tuple[StageTiming, ...]:
    """Time each stage in inference with the fastest backend."""
    parts = {part.name: part for part in analyze_backbone(
        net, (images.shape[2], images.shape[3]), batch_size=len(images)
    ).parts}  # fmt: skip
    net.eval()
    result = []
    with torch.inference_mode():
        tokens = net.patch_embed(images)
        for name, stage in zip(net.stage_names, net.layers, strict=True):
            layer = cast(Stage, stage)

            def run(layer: nn.Module = layer, x: Tensor = tokens) -> object:
                return layer(x)

            seconds = statistics.median(_time(run, tokens) for _ in range(repeats + 1))
            part, size = parts[name], tokens.element_size()
            least = (2 * len(layer.blocks) * tokens.numel() + part.parameters) * size
            floor = max(part.macs / ceilings.macs, least / ceilings.bytes)
            result.append(StageTiming(name, seconds, part.macs, least, floor))
            tokens = layer(tokens)
            if layer.downsample is not None:
                tokens = layer.downsample(tokens.permute(0, 3, 1, 2))
    return tuple(result)


def _runner(contender: Contender, images: Tensor, training: bool) -> Callable[[], object]:
    if contender.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    contender.module.train(training)

    def infer() -> object:
        with torch.inference_mode():
            return contender.features(images)

    def step() -> object:
        contender.module.zero_grad()
        loss = torch.stack([f.float().square().mean() for f in contender.features(images)]).sum()
        loss.backward()
        return loss

    return step if training else infer


def _differences(contenders: Sequence[Contender], images: Tensor) -> list[float | None]:
    expected: Tensor | None = None
    result: list[float | None] = []
    for contender in contenders:
        if not contender.equal:
            result.append(None)
            continue
        contender.module.eval()
        with torch.inference_mode(), policy.force_backend(contender.path):
            feature = contender.features(images)[-1].float()
        expected = feature if expected is None else expected
        difference = float((feature - expected).abs().max() / expected.abs().max())
        if not difference <= TOLERANCE[images.dtype]:
            raise ValueError(
                f"Outputs of {contender.name} differ by {difference:.1e}, so its speed is not "
                "comparable."
            )
        result.append(difference)
    return result


def _saved_bytes(contender: Contender, images: Tensor) -> int:
    storages = {p.untyped_storage()._cdata: p.untyped_storage() for p in _tensors(contender)}
    known = len(storages)

    def pack(tensor: Tensor) -> Tensor:
        storages.setdefault(tensor.untyped_storage()._cdata, tensor.untyped_storage())
        return tensor

    contender.module.train()
    if contender.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, policy.force_backend(contender.path):
        features = contender.features(images)
    del features
    return sum(storage.nbytes() for storage in list(storages.values())[known:])


def _tensors(contender: Contender) -> list[Tensor]:
    return [*contender.module.parameters(), *contender.module.buffers()]


def _time(function: Callable[[], object], like: Tensor) -> float:
    _wait(like)
    start = time.perf_counter()
    function()
    _wait(like)
    return time.perf_counter() - start


def _best(function: Callable[[], object], like: Tensor, repeats: int = 7) -> float:
    return min(_time(function, like) for _ in range(repeats))


def _wait(like: Tensor) -> None:
    if like.is_cuda:
        torch.cuda.synchronize()
