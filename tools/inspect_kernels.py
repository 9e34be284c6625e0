#!/usr/bin/env python3
"""Compile the Triton kernels of a block for a GPU, without needing one, and inspect the code.

For each tile configuration, the output lists registers, spilled and shared memory, and the share of
multiply-adds in the inner loop, which bounds a depthwise convolution.
"""

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from focalnet_det.benchmark.gpu_code import Program

EXAMPLES = """examples:
  tools/inspect_kernels.py
  tools/inspect_kernels.py --channels 192 --kernels 9 11 13 --capability 80
"""


def main() -> None:
    """Run the tool."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--channels", type=int, default=96, metavar="C", help="of a block (96)")
    parser.add_argument("--kernels", type=int, nargs="+", default=[3, 5], metavar="K",
                        help="of its focal levels (3 5)")  # fmt: skip
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--capability", type=int, default=90, metavar="NN",
                        help="compute capability without its point (90)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    import torch

    from focalnet_det.benchmark.gpu_code import compile_kernels

    programs = compile_kernels(
        args.channels, args.kernels, getattr(torch, args.dtype), args.capability
    )
    if args.json:
        print(json.dumps([dataclasses.asdict(program) for program in programs]))
    else:
        print_table(programs)


def print_table(programs: "list[Program]") -> None:
    """Print the programs as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("kernel", "constants")
    for name in ("warps", "registers", "spilled, B", "shared, B", "instructions", "FMA", "s"):
        table.add_column(name, justify="right")
    for one in programs:
        share = f"{one.multiply_adds:.0%}" if one.multiply_adds else ""
        numbers = (one.warps, one.registers, one.spilled, one.shared, one.instructions)
        constants = " ".join(f"{key}={value}" for key, value in one.constants.items())
        table.add_row(one.kernel, constants, *map(str, numbers), share, f"{one.seconds:.1f}")
    Console(width=150).print(table)


if __name__ == "__main__":
    from focalnet_det.errors import one_line_errors

    with one_line_errors():
        main()
