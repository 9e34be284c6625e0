"""The restricted reader: equal to torch.load and pickle on honest files, inert on hostile ones."""

import argparse
import builtins
import collections
import contextlib
import datetime
import io
import os
import pickle
import pickletools
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from focalnet_det.checkpoint import check_file, inspect_checkpoint, read_checkpoint
from focalnet_det.checkpoint.reader.pickled import read_pickles, read_zip
from focalnet_det.checkpoint.reader.unpickle import Placeholder, Unpickler


class HistoryBuffer:
    """A logger's buffer, as mmengine keeps in ``message_hub``: a class that readers lack."""

    def __init__(self, values: Any) -> None:
        self.values = values

    def __setstate__(self, state: dict[str, Any]) -> None:
        raise AssertionError("a class of the file was run")


DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32),
    *(torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64),
)


def tensors() -> dict[str, Any]:
    torch.manual_seed(0)
    shared = torch.randn(6, 4)
    row: dict[str, Any] = {f"dtype.{dtype}": torch.ones(3, 2).mul(3).to(dtype) for dtype in DTYPES}
    return row | {
        "transposed": shared.t(),
        "part": shared[2:4, 1:3],
        "shared": shared,
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "parameter": nn.Parameter(torch.randn(2, 2)),
        "fp8": torch.ones(4).to(torch.float8_e4m3fn),
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_are_those_of_torch_load(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    content = {"model": collections.OrderedDict(tensors()), "epoch": 3, "size": torch.Size([2, 3])}
    if not zipped:
        del content["model"]["fp8"]  # type: ignore[attr-defined]
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    expected = torch.load(path, weights_only=True)
    found = (read_zip if zipped else read_pickles)(path)
    assert found.ignored == []
    assert found.tree["epoch"] == 3
    assert found.tree["size"] == (2, 3)
    assert list(found.tree["model"]) == list(expected["model"])
    for name, tensor in expected["model"].items():
        actual = found.tree["model"][name]
        assert actual.dtype == tensor.dtype
        assert actual.stride() == tensor.stride()
        assert torch.equal(actual.to(torch.complex64), tensor.detach().to(torch.complex64)), name
    pair = [found.tree["model"][name].untyped_storage().data_ptr() for name in ("shared", "part")]
    assert pair[0] == pair[1]


def test_numbers_of_another_byte_order(tmp_path: Path) -> None:
    path = tmp_path / "big.pth"
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(5.0)}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name.endswith("byteorder"):
                data = b"big"
            elif name.endswith("data/0"):
                data = np.frombuffer(data, "<f4").astype(">f4").tobytes()
            new.writestr(name, data)
    assert read_checkpoint(path).tensors["a"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_pickles_are_those_of_pickle(protocol: int, tmp_path: Path) -> None:
    content = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "order": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big": np.arange(3, dtype=">i4"),
        "scalars": [np.float64(2.5), np.int64(-3), np.bool_(True), np.float32(0.5)],
        "plain": (1, -5, 1 << 70, 2.5, "text", "späte", b"\x00\xff", None, True, bytearray(b"x")),
        "dicts": [collections.OrderedDict(b=1, a=2), collections.defaultdict(list, {"c": [1]})],
        "sets": ({1, 2}, frozenset({"x"})),
        "key": {(1, "a"): 2},
        "nested": [[{"deep": [np.ones(2)]}]],
    }
    actual = Unpickler(pickle.dumps(content, protocol)).decode()
    assert list(actual) == list(content)
    for name in ("a", "order", "big"):
        np.testing.assert_array_equal(actual[name], content[name])
    np.testing.assert_array_equal(actual["nested"][0][0]["deep"][0], np.ones(2))
    for name in ("scalars", "dicts", "sets", "key"):
        assert actual[name] == content[name]
    assert actual["plain"][:9] == content["plain"][:9]
    path = tmp_path / "zoo.pkl"
    path.write_bytes(
        pickle.dumps({"model": {"conv.weight": content["a"]}, "author": "x"}, protocol)
    )
    assert torch.equal(
        read_checkpoint(path).tensors["conv.weight"], torch.arange(6.0).reshape(2, 3)
    )


def test_arrays_of_python_2() -> None:
    """Text for bytes, as in Detectron's model zoo."""
    pickled = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I2\nt"
        b"cnumpy\ndtype\n(S'f4'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntbI00\n"
        b"S'\\x00\\x00\\x80?\\x00\\x00\\x00@'\ntb."
    )
    assert Unpickler(pickled).decode().tolist() == [1.0, 2.0]


def mmdet_file() -> dict[str, Any]:
    """As mmengine's Runner saves it: log, config, versions and NumPy scalars beside the weights."""
    return {
        "meta": {
            "epoch": 12,
            "iter": 87960,
            "cfg": "model = dict()",
            "seed": np.int64(7),
            "time": datetime.datetime(2024, 1, 2),
            "dataset_meta": {"CLASSES": ("person", "cat"), "PALETTE": [(1, 2, 3)]},
            "best": np.float64(0.42),
            "args": argparse.Namespace(config="x.py"),
            "work_dir": Path("work_dirs/a"),
        },
        "state_dict": {"backbone.a": torch.arange(3.0), "head.b": torch.ones(2)},
        "message_hub": {
            "log_scalars": {"loss": HistoryBuffer(np.ones(3))},
            "runtime_info": collections.OrderedDict(lr=np.float32(0.1)),
        },
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]},
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_mmdet_3(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "epoch_12.pth"
    torch.save(mmdet_file(), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    found = read_checkpoint(path)
    assert check_file(path) is None
    assert found.containers == ("state_dict",)
    assert found.progress == {"epoch": 12, "iter": 87960}
    assert {n: t.tolist() for n, t in found.tensors.items()} == {
        "backbone.a": [0, 1, 2],
        "head.b": [1, 1],
    }
    assert any(name.endswith("HistoryBuffer") for name in found.ignored)
    assert inspect_checkpoint(path).ignored == list(found.ignored)


# Hostile pickles, each tried alone, nested, and in both formats of torch.save.


class Call:
    """Call a function when it is unpickled by others."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def attacks(marker: Path) -> dict[str, Any]:
    code = f"open({str(marker)!r}, 'w').close()"
    get = Call(getattr, Path, "touch")
    return {
        "os.system": Call(os.system, f"touch {marker}"),
        "subprocess": Call(subprocess.check_call, ["touch", str(marker)]),
        "eval": Call(eval, code),
        "exec": Call(exec, code),
        "open": Call(open, str(marker), "w"),
        "import": Call(builtins.__import__, "os"),
        "getattr": Call(getattr, marker, "touch"),
        "a method by a chain": Call(getattr, Call(getattr, get, "__globals__"), "get"),
        "touch": Call(Path.touch, marker),
        "apply": Call(map, Path.touch, [marker]),
        "nested": Call(list, Call(map, Call(getattr, Path, "touch"), [marker])),
        "sys.modules": Call(getattr, sys.intern, "__self__"),
        "torch.load": Call(torch.load, str(marker)),
        "torch.hub": Call(torch.hub.load_state_dict_from_url, "http://127.0.0.1:9/a.pth"),
        "numpy.load": Call(np.load, str(marker)),
        "copyreg": Call(type, "Name", (), {}),
    }


NAMES = sorted(attacks(Path("marker")))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_hostile_files_run_nothing(name: str, zipped: bool, tmp_path: Path) -> None:
    """Refused, or read without what is hostile; the weights are those of the file."""
    marker = tmp_path / "code_ran"
    attack = attacks(marker)[name]
    weights = {"a": torch.arange(3.0)}
    contents: list[Any] = [
        {"state_dict": weights, "meta": attack},
        {"state_dict": weights, "meta": {"x": [(1, attack)], "y": {2: attack}}},
        {"meta": [attack, attack], "state_dict": weights},
    ]
    for number, content in enumerate(contents):
        path = tmp_path / f"{number}.pth"
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        modules = set(sys.modules)
        problem = check_file(path)
        if problem is None:
            found = read_checkpoint(path)
            assert torch.equal(found.tensors["a"], weights["a"])
            assert found.ignored
        else:
            assert "do not trust this file" in problem
        assert set(sys.modules) == modules
    path = tmp_path / "weight.pth"
    torch.save({"state_dict": weights | {"b.weight": attack}}, path)
    with pytest.raises(
        ValueError, match=r"weight\.pth.*(do not trust this file|which cannot be read)"
    ):
        read_checkpoint(path)
    assert not marker.exists()


def test_known_attacks_are_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.pth"
    torch.save({"a": torch.ones(1), "b": Call(os.system, "true")}, path)
    message = r"it asks for (posix|nt)\.system, which no weights need: do not trust this file\.$"
    with pytest.raises(ValueError, match=message):
        read_checkpoint(path)


def raw(*parts: bytes) -> bytes:
    return b"\x80\x04" + b"".join(parts) + b"."


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def a_global(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


def test_nothing_can_be_set_on_what_the_reader_gives_out() -> None:
    """BUILD with a state of slots is a ``setattr`` in the standard machine."""
    for module, name in (("collections", "OrderedDict"), ("torch._utils", "_rebuild_tensor_v2")):
        state = b"N" + b"}" + text("__class__") + text("x") + b"s" + b"\x86b"
        found = Unpickler(raw(a_global(module, name), state), {}).decode()
        assert not hasattr(found, "__dict__") or "__class__" not in vars(found)
    before = dict(vars(Placeholder))
    Unpickler(raw(a_global("some", "Class"), b"N}", text("__init__"), b"Ns\x86b")).decode()
    assert dict(vars(Placeholder)) == before


@pytest.mark.parametrize(
    "pickled",
    [
        raw(b"\x82\x01"),  # the registry of extensions
        raw(b"\x97"),  # buffers outside the file
        raw(b"(", text("a"), b"i"),
        raw(a_global("builtins", "bytearray"), b"J\xff\xff\xff\x7f\x85R", b"\x94" * 3, b"0"),
        raw(a_global("builtins", "list"), b"J\xff\xff\xff\x7f\x85R"),
        raw(b"\x8e" + struct.pack("<Q", 1 << 60)),  # bytes that are not there
        raw(b"\x96" + struct.pack("<Q", 1 << 60)),
        raw(b"\x95" + struct.pack("<Q", 1 << 60)),
        raw(a_global("numpy", "dtype"), text("O"), b"\x85R"),
        raw(a_global("numpy", "dtype"), text("f4,f4"), b"\x85R"),
        raw(b"Vtext\n", b"V\n", b"\x93\x93"),
        b"0" * 50,
        b"\x80\x04",
    ],
)
def test_programs_that_are_refused_or_inert(pickled: bytes) -> None:
    found: Any = None
    with contextlib.suppress(ValueError):
        found = Unpickler(pickled).decode()
    assert found is None or isinstance(found, Placeholder)


def test_keys_whose_hash_takes_for_ever() -> None:
    """Two million million million leaves in a tuple of 60 bytes."""
    key = b"K\x01" + b"2\x86" * 60
    found = Unpickler(raw(b"}", key, b"K\x02s")).decode()
    assert list(found.values()) == [2]
    for build in (b"(" + key + b"\x91", b"\x8f(" + key + b"\x90"):
        assert len(Unpickler(raw(build)).decode()) == 1


def test_arrays_declare_their_sizes_in_vain() -> None:
    big = pickle.dumps(np.ones(3), 2).replace(b"K\x03\x85", b"J\xff\xff\xff\x7f\x85")
    assert big != pickle.dumps(np.ones(3), 2)
    with pytest.raises(ValueError, match="does not have the size that it declares"):
        Unpickler(big).decode()


def test_small_programs_that_build_something_large() -> None:
    """A memo and a constructor copy one megabyte a thousand times, in ten bytes each."""
    megabyte = text("latin1") + b"\x94" + b"X" + struct.pack("<I", 1 << 20) + b"a" * (1 << 20)
    encode = a_global("_codecs", "encode") + b"\x94"
    start = b"]" + megabyte + b"\x940" + encode + b"0"
    # Memo: 0 the encoding, 1 the text, 2 the function.
    program = raw(start, b"h\x02h\x01h\x00\x86R0" * 1000)
    with pytest.raises(ValueError, match="far larger than the file"):
        Unpickler(program).decode()
    items = b"(" + b"K\x01" * 50_000 + b"l\x940" + a_global("builtins", "list") + b"\x940"
    with pytest.raises(ValueError, match="far larger than the file"):
        Unpickler(raw(items, b"h\x01h\x00\x85R0" * 1000)).decode()


def test_one_storage_of_two_sizes(tmp_path: Path) -> None:
    path = tmp_path / "two.pth"
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(6), "b": torch.ones(7)}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, data.replace(b"X\x01\0\0\x001", b"X\x01\0\0\x000"))
    assert check_file(path) == "it is damaged (one storage of two sizes)"


def test_control_characters_are_not_printed(tmp_path: Path) -> None:
    path = tmp_path / "escape.pkl"
    path.write_bytes(raw(a_global("os", "\x1b[2Jx")))
    assert check_file(path) == "it asks for os.?[2Jx, which no weights need: do not trust this file"


def test_no_instruction_of_the_standard_machine_is_left_that_calls() -> None:
    calling = {"GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "REDUCE", "NEWOBJ", "NEWOBJ_EX", "BUILD"}
    calling |= {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "DICT", "FROZENSET"}
    absent = {"EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER", "PERSID"}
    for opcode in pickletools.opcodes:
        ours = Unpickler.dispatch.get(ord(opcode.code))
        theirs = pickle._Unpickler.dispatch[ord(opcode.code)]  # type: ignore[attr-defined]
        if opcode.name in absent:
            assert ours is None
        elif opcode.name in calling:
            assert ours is not None
            assert ours is not theirs
