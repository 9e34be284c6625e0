"""What needs a GPU: networks at sizes of detection, compilers, CUDA graphs, a step of each model.

Values and gradients of the kernels at small sizes are in ``focal_block/triton``, which run
on the GPU where there is one.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from focalnet_det import create_backbone
from focalnet_det.ops.focal_block import policy
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

# Largest difference over the largest value, through a whole network.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 2e-2}
KERNELS = {"3,5": (2, 3), "9,11,13": (3, 9)}


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(policy.VARIABLE, raising=False)
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


def network(levels: int, window: int, **options: object) -> torch.nn.Module:
    net = create_backbone(
        "focalnet_tiny_srf", focal_levels=(levels,) * 4, focal_windows=(window,) * 4,
        drop_path_rate=0.0, **options,
    )  # fmt: skip
    return net.cuda()


def step(net: torch.nn.Module, run: object, x: Tensor) -> dict[str, Tensor]:
    """Features and gradients of a loss that no norm makes constant."""
    net.zero_grad()
    features = run(x)
    sum(f.float().pow(3).mean() for f in features.values()).backward()
    gradients = {k: p.grad.clone() for k, p in net.named_parameters()}
    return {k: f.detach() for k, f in features.items()} | gradients


def assert_close(actual: dict, expected: dict, tolerance: float) -> None:
    for key, value in expected.items():
        difference = (actual[key].double() - value.double()).norm() / value.double().norm()
        assert difference <= tolerance, key


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", [(800, 1216), (333, 517)])
def test_network_equals_the_reference(
    kernels: str, dtype: torch.dtype, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    net, x = network(*KERNELS[kernels]), torch.randn(2, 3, *size, device="cuda")
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        actual, again = step(net, net, x), step(net, net, x)
    assert all(torch.equal(actual[key], again[key]) for key in net.output_shape())
    monkeypatch.setenv(policy.VARIABLE, "reference")
    assert_close(actual, step(net, net, x), TOLERANCE[dtype])
    with torch.no_grad(), torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        expected = net.eval()(x)
        monkeypatch.delenv(policy.VARIABLE)
        assert_close(net(x), expected, TOLERANCE[dtype])


def test_blocks_repeat_bit_for_bit() -> None:
    block, x = network(2, 3).layers[0].blocks[0], torch.randn(2, 97, 131, 96, device="cuda")
    runs = []
    for _ in range(2):
        block.zero_grad()
        block(x).pow(3).sum().backward()
        runs.append({k: p.grad.clone() for k, p in block.named_parameters()})
    assert all(torch.equal(runs[1][key], value) for key, value in runs[0].items())


@pytest.mark.parametrize("kernels", KERNELS)
def test_compiled_by_inductor(kernels: str) -> None:
    net = network(*KERNELS[kernels])
    compiled = torch.compile(net, fullgraph=True, dynamic=True)
    for size in ((256, 320), (333, 517)):
        x = torch.randn(2, 3, *size, device="cuda")
        assert_close(step(net, compiled, x), step(net, net, x), TOLERANCE[torch.float32])


@torch.no_grad()
def test_cuda_graph() -> None:
    net, x = network(2, 3).eval().bfloat16(), torch.randn(1, 3, 224, 320, device="cuda").bfloat16()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            net(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        features = net(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert_close(features, net(x), 1e-6)


@torch.inference_mode()
def test_compiled_with_cuda_graphs() -> None:
    net = network(2, 3).eval().bfloat16()
    compiled = torch.compile(net, mode="reduce-overhead")
    for _ in range(4):
        x = torch.randn(1, 3, 224, 320, device="cuda").bfloat16()
        actual = {key: feature.clone() for key, feature in compiled(x).items()}
        assert_close(actual, net(x), TOLERANCE[torch.bfloat16])


def test_memory_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = {}
    for path in ("reference", "triton"):
        monkeypatch.setenv(policy.VARIABLE, path)
        net, x = network(2, 3), torch.randn(2, 3, 512, 512, device="cuda")
        with torch.autocast("cuda", torch.bfloat16):
            step(net, net, x)
            torch.cuda.reset_peak_memory_stats()
            step(net, net, x)
        peaks[path] = torch.cuda.max_memory_allocated()
        del net
    assert peaks["triton"] <= 0.5 * peaks["reference"]


CONFIGS = sorted(
    str(path.relative_to(ROOT / "configs")) for path in (ROOT / "configs").glob("*/*nano*small.py")
)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_training_step_of_each_model(config: str) -> None:
    from detectron2.config import LazyConfig, instantiate
    from detectron2.structures import BitMasks, Boxes, Instances
    from detectron2.utils.events import EventStorage

    model = instantiate(LazyConfig.load(str(ROOT / "configs" / config)).model).cuda().train()
    instances = Instances((192, 256))
    instances.gt_boxes = Boxes(torch.tensor([[20.0, 30, 120, 150], [100, 20, 240, 180]]))
    instances.gt_classes = torch.tensor([0, 1])
    masks = torch.zeros(2, 192, 256, dtype=torch.bool)
    masks[0, 30:150, 20:120] = masks[1, 20:180, 100:240] = True
    instances.gt_masks = BitMasks(masks)
    example = {
        "image": torch.randint(0, 256, (3, 192, 256), dtype=torch.uint8),
        "height": 192, "width": 256, "instances": instances,
        "sem_seg": masks.any(0).long(),
    }  # fmt: skip
    with EventStorage(), torch.autocast("cuda", torch.bfloat16):
        losses = model([example, example])
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    backbone = [p for k, p in model.named_parameters() if "layers.0.blocks.0" in k]
    assert backbone
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in backbone)
