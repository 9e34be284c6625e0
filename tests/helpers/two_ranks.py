"""Calls a function in two processes, with their rank and the other words; see processes.py."""

import importlib
import sys

import torch.multiprocessing

if __name__ == "__main__":
    module, function, *arguments = sys.argv[1:]
    work = getattr(importlib.import_module(module), function)
    torch.multiprocessing.start_processes(work, tuple(arguments), nprocs=2, start_method="fork")
