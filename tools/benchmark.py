#!/usr/bin/env python3
"""Compare speed and memory of backbones with other libraries, interleaved in one process."""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from focalnet_det.backbones import StagedBackbone
    from focalnet_det.benchmark.contenders import Contender

EXAMPLES = """examples:
  tools/benchmark.py --size 800 1216
  tools/benchmark.py --training --size 512 512 --kernels 9 11 13 --dtype bfloat16
  tools/benchmark.py --peers timm swin convnext resnet --size 224 224 --batch-size 8 --json out.json
  tools/benchmark.py --variant focal_tiny --size 800 1216 --peers torchvision
  tools/benchmark.py --products --size 512 512
  tools/benchmark.py --training --size 512 512 --detector \
      configs/COCO-InstanceSegmentation/mask_rcnn_{focalnet_tiny_srf,swin_tiny}_fpn_1x.py
  tools/benchmark.py --size 512 512 --peers mask2former --detector \
      configs/ADE20K-SemanticSegmentation/mask2former_focalnet_tiny_lrf_160k.py
  tools/benchmark.py --suite throughput --variant 'focalnet_tiny*' --repeats 3
  tools/benchmark.py --suite throughput --device cuda --dtype float16 --batch-size 128
"""
OTHERS = {
    "swin": "swin_tiny_patch4_window7_224",
    "convnext": "convnext_tiny",
    "resnet": "resnet50",
}
# Peers with the same architecture and weights as FocalNet-T.
EQUAL = ("timm", "transformers")
OWN_SETTINGS = (
    ("ours", None, False),
    ("ours, lean", None, True),
    ("ours, torch path", "torch", False),
    ("ours, reference", "reference", False),
)
# "torchvision" means its Swin-T, "mask2former" that of transformers with Swin-T, for --detector.
PEERS = ("timm", "transformers", *OTHERS, "torchvision", "mask2former")


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernels", type=int, nargs="+", default=[3, 5], metavar="K")
    parser.add_argument("--training", action="store_true", help="training steps, not inference")
    parser.add_argument("--variant", metavar="NAME", help="a backbone instead of FocalNet-T")
    parser.add_argument("--size", type=int, nargs=2, default=(224, 224), metavar=("H", "W"))
    parser.add_argument("--batch-size", type=int, default=1, metavar="N")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peers", nargs="*", choices=PEERS, metavar="PEER",
                        help=f"some of {', '.join(PEERS)}; timm by default")  # fmt: skip
    parser.add_argument("--detector", type=Path, nargs="+", metavar="CONFIG",
                        help="whole detectors of recipes; the first on all our paths")  # fmt: skip
    parser.add_argument("--only", nargs="+", metavar="ROW", help="of all rows, ours and these")
    parser.add_argument("--compile", action="store_true", help="all through torch.compile too")
    parser.add_argument("--repeats", type=int, default=5, metavar="R")
    parser.add_argument("--cpu-time", action="store_true",
                        help="not that of the wall clock: for busy machines")  # fmt: skip
    parser.add_argument("--threads", type=int, metavar="T", help="of PyTorch, on CPUs")
    parser.add_argument("--roofline", action="store_true", help="our stages against the machine")
    parser.add_argument("--products", action="store_true",
                        help="float32 products of FocalNet and a box head")  # fmt: skip
    parser.add_argument("--suite", choices=("gpu", "throughput"),
                        help="all rows for a GPU; or images/s of all classifiers")  # fmt: skip
    parser.add_argument("--sizes", type=int, nargs="+", default=(224, 448, 896), metavar="S",
                        help="of --suite throughput; --batch-size is that of 224 px")  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("output/benchmark"), metavar="FOLDER",
                        help="of --suite; what it holds is not measured again")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the times")
    return parser.parse_args()


def contenders(args: argparse.Namespace) -> list["Contender"]:
    """Build our settings, followed by the installed peers."""
    import copy

    from focalnet_det.benchmark import contenders as peers

    if args.detector:
        return detectors(args)
    if "mask2former" in (args.peers or ()):
        raise ValueError("--peers mask2former requires --detector with a recipe of Mask2Former.")
    if args.variant and set(args.peers or ()) & set(EQUAL):
        raise ValueError("timm and transformers are compared with FocalNet-T. Remove --variant.")
    levels, window = len(args.kernels), args.kernels[0]
    if args.kernels != list(range(window, window + 2 * levels, 2)):
        raise ValueError("--kernels must increase by 2 from level to level, such as 9 11 13.")
    ours = named(args.variant) if args.variant else peers.focalnet(levels, window)
    builders = peer_builders(ours, args)
    result = [
        own_setting(copy.deepcopy(ours), args, *setting)
        for setting in OWN_SETTINGS
        if setting[0] != "ours, lean" or (args.training and not args.variant)
    ]
    for setting, mode in compile_modes(args).items():
        own = own_setting(copy.deepcopy(ours), args, f"ours{setting}", None, False)
        result.append(compiled(own, mode))
    for peer in args.peers if args.peers is not None else [] if args.variant else ["timm"]:
        try:
            result += peer_settings(peer, builders[peer], args)
        except ImportError as error:
            print(f"skipped {peer}: {error}")
    return result


def peer_builders(
    ours: Any, args: argparse.Namespace
) -> "dict[str, Callable[[], tuple[Any, Any]]]":
    """Return what builds each peer's module and features."""
    from focalnet_det.benchmark import contenders as peers

    levels, window = len(args.kernels), args.kernels[0]
    builders: dict[str, Callable[[], tuple[Any, Any]]] = {
        "timm": lambda: peers.timm_focalnet(ours, levels, window),
        "transformers": lambda: peers.transformers_focalnet(ours, levels, window),
        "torchvision": peers.torchvision_swin,
    }
    for short, name in OTHERS.items():
        builders[short] = lambda name=name: peers.timm_backbone(name, tuple(args.size))
    return builders


def named(variant: str) -> "StagedBackbone":
    """Build a backbone without output norms and drop path."""
    from focalnet_det import create_backbone

    return create_backbone(variant, output_norm=False, drop_path_rate=0.0)


def detectors(args: argparse.Namespace) -> list["Contender"]:
    """Build the detectors of recipes; the first one with each of our backends."""
    import torch

    from focalnet_det.benchmark.recipe_models import detector, transformers_mask2former

    if set(args.peers or ()) - {"mask2former"}:
        raise ValueError("With --detector, --peers supports only mask2former.")
    if args.dtype != "float32" or args.compile or args.roofline:
        raise ValueError("--detector supports only float32, without --compile and --roofline.")
    device = torch.device(args.device)
    paths = [(args.detector[0], path) for path in (None, "torch", "reference")]
    others = [(config, None) for config in args.detector[1:]]
    found = [detector(config, device, path=path) for config, path in paths + others]
    if args.peers:
        found.append(transformers_mask2former(150, device))
    return found


def own_setting(
    net: "StagedBackbone", args: argparse.Namespace, name: str, path: str | None, lean: bool
) -> "Contender":
    """Return our network in one setting."""
    import torch

    from focalnet_det.backbones.focalnet import FocalNetBlock
    from focalnet_det.benchmark.contenders import Contender

    net.to(args.device, getattr(torch, args.dtype))
    for module in net.modules():
        if isinstance(module, FocalNetBlock):
            module.lean_training = lean
    return Contender(name, net, lambda x: list(net(x).values()), path=path, equal=True)


def compile_modes(args: argparse.Namespace) -> dict[str, str]:
    """Return the label and mode of each setting of ``torch.compile``."""
    if not args.compile:
        return {}
    # CUDA graphs avoid the launch overhead that dominates at small batch sizes.
    graphs = {} if args.device == "cpu" or args.training else {", CUDA graphs": "reduce-overhead"}
    return {", compiled": "default"} | graphs


def compiled(contender: "Contender", mode: str) -> "Contender":
    """Return a contender whose forward pass is compiled."""
    import torch

    return dataclasses.replace(contender, features=torch.compile(contender.features, mode=mode))


def peer_settings(
    name: str, build: "Callable[[], tuple[Any, Any]]", args: argparse.Namespace
) -> list["Contender"]:
    """Build a peer unchanged, in channels-last format, and compiled if requested."""
    import torch

    from focalnet_det.benchmark.contenders import Contender

    def built(setting: str) -> Contender:
        module, features = build()
        module.to(args.device, getattr(torch, args.dtype))
        if setting:
            module.to(memory_format=torch.channels_last)
        return Contender(name + setting, module, features, bool(setting), equal=name in EQUAL)

    plain = [built(""), built(", channels last")]
    return plain + [compiled(built(setting), mode) for setting, mode in compile_modes(args).items()]


def machine(device: "torch.device") -> str:
    """Describe the device."""
    import platform

    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor()
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{name}, {torch.get_num_threads()} threads, {capability}, torch {torch.__version__}"


def run_throughput(args: argparse.Namespace) -> None:
    """Measure the classifiers whose names match ``--variant``, all by default."""
    import torch

    from focalnet_det.benchmark import throughput

    if args.repeats < 1 or min(*args.sizes, args.batch_size) < 1:
        raise ValueError("--repeats, --sizes and --batch-size must be positive.")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    throughput.run(
        args.output,
        pattern=args.variant or "*",
        sizes=args.sizes,
        base_batch=args.batch_size,
        device=device,
        dtype=getattr(torch, args.dtype),
        machine=machine(device),
        repeats=args.repeats,
    )


def run_suite(output: Path) -> None:
    """Run the GPU suite."""
    import torch

    from focalnet_det.benchmark import gpu_suite

    if not torch.cuda.is_available():
        raise ValueError("--suite gpu requires a CUDA device, but PyTorch finds none.")
    gpu_suite.run(Path(__file__).resolve(), output)


def timing_report(timings: list[Any], args: argparse.Namespace, where: str) -> dict[str, Any]:
    """Return the content of --json."""
    from focalnet_det.benchmark.backbone_speed import process_peak_bytes

    return {
        "machine": where,
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "timings": [dataclasses.asdict(t) | {"median": t.median} for t in timings],
        "process_peak_bytes": process_peak_bytes(),
    }


def measure_roofline(net: Any, images: "torch.Tensor", repeats: int) -> dict[str, Any]:
    """Print our stages against the limits of the machine, and return them for --json."""
    import torch

    from focalnet_det.benchmark import backbone_speed as speed
    from focalnet_det.benchmark import benchmark_tables as tables

    dtype = torch.float32 if images.device.type == "cpu" else images.dtype
    ceilings = speed.measure_ceilings(dtype, images.device)
    stages = speed.roofline(net, images, ceilings, repeats)
    tables.print_roofline(stages, ceilings)
    return {
        "roofline": [dataclasses.asdict(stage) for stage in stages],
        "ceilings": dataclasses.asdict(ceilings),
    }


def main() -> None:
    """Run the tool."""
    args = parse_args()
    if args.suite == "throughput":
        run_throughput(args)
        return
    if args.suite:
        run_suite(args.output)
        return
    import torch

    from focalnet_det.benchmark import backbone_speed as speed
    from focalnet_det.benchmark import benchmark_tables as tables

    if args.repeats < 1 or min(*args.size, args.batch_size) < 1:
        raise ValueError("--repeats, --size and --batch-size must be positive.")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    where = machine(device) + (", CPU time" if args.cpu_time else "")
    if args.products:
        tables.print_products(args, where)
        return
    images = torch.randn(args.batch_size, 3, *args.size, device=device).to(dtype)
    ours, *others = contenders(args)
    networks = [ours, *(c for c in others if not args.only or c.name in args.only)]
    clock = time.process_time if args.cpu_time else time.perf_counter
    timings = speed.compare(
        networks, images, training=args.training, repeats=args.repeats, clock=clock
    )
    tables.print_table(timings, args, where)
    report = timing_report(timings, args, where)
    if args.roofline:
        report |= measure_roofline(networks[0].module, images, args.repeats)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    if args.plot:
        tables.plot(timings, args.plot, where)


if __name__ == "__main__":
    from focalnet_det.errors import one_line_errors

    with one_line_errors():
        main()
