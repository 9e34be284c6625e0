"""Decode pickles without importing or calling anything that they name.

A pickle is a program for a stack machine, and the standard library's machine calls whatever global
the program names. This one neither imports nor calls: it has a fixed table of constructors for
plain containers, tensors and NumPy arrays, and every other global becomes an inert
:class:`Placeholder`. So the safety does not depend on a list of dangerous names, and the tensors of
files that also hold harmless objects of unknown classes (a config, a logger) can be read.

Dict keys whose hash takes exponential time, and declared sizes without data, are refused as well.
"""

import math
import pickle
import re
from collections.abc import Callable, Mapping
from io import BytesIO
from typing import Any, ClassVar

import numpy as np

from .raw import first_line

# Attacks use these modules, and no weights need them. Their objects would be inert as well, but the
# file is refused, because its owner should know.
HOSTILE_MODULES = (
    *("os", "posix", "nt", "subprocess", "sys", "socket", "shutil", "runpy", "importlib"),
    *("ctypes", "pty", "pdb", "timeit", "webbrowser", "pip"),
)
HOSTILE_BUILTINS = (
    *("eval", "exec", "execfile", "compile", "open", "file", "__import__", "input", "breakpoint"),
)
BUILTINS = ("builtins", "__builtin__", "io", "_io")
# Bytes or items that a program may build for each of its own bytes, and the least limit.
MAX_GROWTH, MIN_BUDGET = 20, 1 << 20
MAX_DIMENSIONS = 64
# Numbers and text of fixed size; arrays of objects would need another unpickler.
DTYPE = re.compile(r"[<>|=]?([biufc?]\d{0,2}|[SU]\d{1,4})")
SEQUENCES = (list, tuple, set, frozenset, dict)
Scalar = str | int | float | complex | bool | bytes | None

# Instructions that are left to the standard library: plain values, stack and memo.
_PLAIN = """
PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWFALSE NEWTRUE INT BININT BININT1 BININT2 LONG LONG1
LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 UNICODE
BINUNICODE SHORT_BINUNICODE BINUNICODE8 TUPLE EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST EMPTY_DICT
EMPTY_SET GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE BINPERSID
"""


class Placeholder:
    """An inert stand-in for an object whose class is never imported."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"<{self.name}, not read>"


class Constructor:
    """A function of this module that a pickle may call, but not modify."""

    __slots__ = ("build", "name")

    def __init__(self, name: str, build: Callable[..., Any]) -> None:
        self.name = name
        self.build = build


class _Builder:
    """An array or a dtype whose state, a tuple, follows later in the program."""

    def __init__(self, value: Any, set_state: Callable[[Any, Any], Any]) -> None:
        self.value = value
        self.set_state = set_state


class Unpickler(pickle._Unpickler):
    """Unpickler of the standard library with its importing and calling instructions replaced.

    Args:
        data: one pickle.
        constructors: module.name -> function or constant, in addition to the plain ones.
        storage: called with persistent ids, which torch.save uses for its storages.

    Attributes:
        ignored: names of the globals that became placeholders, in order of appearance.
    """

    # Declared for the type checker; the base class of the standard library defines them.
    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    read: Callable[[int], bytes]
    readline: Callable[[], bytes]

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]]
        for name in _PLAIN.split()
    }

    def __init__(
        self,
        data: bytes,
        constructors: Mapping[str, Any] | None = None,
        storage: Callable[[Any], Any] | None = None,
    ) -> None:
        # latin1: Python 2 wrote bytes as text. BytesIO returns what it has, even if asked for more.
        super().__init__(BytesIO(data), encoding="latin1")
        self._constructors = {**PLAIN_CONSTRUCTORS, **(constructors or {})}
        self._storage = storage
        self.ignored: dict[str, None] = {}
        # With a memo, a small program can copy something large many times.
        self._budget = MAX_GROWTH * len(data) + MIN_BUDGET

    def decode(self) -> Any:
        """Decode the pickle to plain containers, arrays, results of constructors and placeholders.

        Raises: ValueError if the pickle is damaged, or asks for functions that no weights need.
        """
        try:
            return _unwrap_builder(self.load())
        except ValueError:
            raise
        except Exception as error:  # a damaged program can cause any error
            kind = type(error).__name__
            raise ValueError(f"it is cut off or damaged ({kind}: {first_line(error)})") from None

    def persistent_load(self, pid: Any) -> Any:
        """Return the storage that a pickle of torch.save refers to.

        Raises: ValueError if the file has no storages.
        """
        if self._storage is None:
            raise ValueError("it refers to data outside the file")
        return self._storage(pid)

    def find_class(self, module: str, name: str) -> Any:
        """Return a constructor, a constant or a placeholder; never the global itself.

        Raises: ValueError for globals that attacks use.
        """
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("it is damaged (the name of a global is not text)")
        full = "".join(c if c.isprintable() else "?" for c in f"{module}.{name}"[:200])
        known = self._constructors.get(full)
        if known is not None:
            return Constructor(full, known) if callable(known) else known
        if module.partition(".")[0] in HOSTILE_MODULES or (
            module in BUILTINS and name in HOSTILE_BUILTINS
        ):
            raise ValueError(
                f"it asks for {full[:80]}, which no weights need: do not trust this file"
            )
        self.ignored[full] = None
        return Placeholder(full)

    def _construct(self, function: Any, arguments: Any) -> Any:
        if isinstance(function, Constructor):
            if type(arguments) is not tuple:
                raise ValueError("it is damaged (a constructor without arguments)")
            built = function.build(*(_unwrap_builder(argument) for argument in arguments))
            self._charge(built)
            return built
        return Placeholder(getattr(function, "name", "an object"))

    def _charge(self, built: Any) -> None:
        """Subtract what the program builds from its budget.

        Raises: ValueError if the budget is exhausted.
        """
        if isinstance(built, np.ndarray):
            self._budget -= built.nbytes
        elif isinstance(built, (str, bytes, *SEQUENCES)):
            self._budget -= len(built)
        if self._budget < 0:
            raise ValueError("its content is far larger than the file")

    def _global(self) -> None:
        module, name = (self.readline()[:-1].decode("utf-8") for _ in range(2))
        self.append(self.find_class(module, name))

    def _stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.append(self.find_class(module, name))

    def _instance(self) -> None:
        module, name = (self.readline()[:-1].decode("ascii") for _ in range(2))
        arguments = tuple(self.pop_mark())
        self.append(self._construct(self.find_class(module, name), arguments))

    def _object(self) -> None:
        function, *arguments = self.pop_mark()
        self.append(self._construct(function, tuple(arguments)))

    def _reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self.append(self._construct(function, arguments))

    def _new_object_with_keywords(self) -> None:
        keywords = self.stack.pop()
        self._reduce()
        if keywords:
            self.stack[-1] = Placeholder("an object with options")

    def _build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, _Builder):
            if type(state) is not tuple:
                raise ValueError("it is damaged (the state of an array)")
            target.value = target.set_state(target.value, tuple(_unwrap_builder(s) for s in state))
            self._charge(target.value)

    def _append_one(self) -> None:
        value = _unwrap_builder(self.stack.pop())
        if type(self.stack[-1]) is list:
            self.stack[-1].append(value)

    def _append_many(self) -> None:
        values = [_unwrap_builder(value) for value in self.pop_mark()]
        if type(self.stack[-1]) is list:
            self.stack[-1].extend(values)

    def _list(self) -> None:
        # A local variable, because `pop_mark` rebinds `append` to another stack.
        items = self.pop_mark()
        self.append([_unwrap_builder(value) for value in items])

    def _dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._set_items(items)

    def _set_one(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def _set_many(self) -> None:
        self._set_items(self.pop_mark())

    def _set_items(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is dict:
            for key, value in zip(items[::2], items[1::2], strict=True):
                self.stack[-1][_hashable(key)] = _unwrap_builder(value)

    def _add_items(self) -> None:
        items = self.pop_mark()
        if type(self.stack[-1]) is set:
            self.stack[-1].update(_hashable(item) for item in items)

    def _frozen_set(self) -> None:
        items = self.pop_mark()
        self.append(frozenset(_hashable(item) for item in items))

    def _bytearray(self) -> None:
        self.append(self.read(int.from_bytes(self.read(8), "little")))


def _unwrap_builder(value: Any) -> Any:
    """Return the array or dtype of a builder; other values are unchanged."""
    return value.value if isinstance(value, _Builder) else value


def _hashable(key: Any) -> Any:
    """Return a key that is cheap to hash: text, numbers, flat tuples; a placeholder for others."""
    flat = key if type(key) is tuple else (key,)
    return key if all(isinstance(k, Scalar | Placeholder) for k in flat) else Placeholder("a key")


def _mapping(items: Any = (), *_: Any) -> Any:
    """Build a dict from another one or from pairs."""
    pairs = items.items() if type(items) is dict else items
    if not isinstance(items, SEQUENCES):
        return Placeholder("a dict of what is not read")
    return {_hashable(key): value for key, value in pairs}


def _sequence(kind: Callable[[Any], Any]) -> Callable[..., Any]:
    """Return the constructor of a list, tuple or set from plain containers.

    Other iterables are refused: an expanded tensor would be endless.
    """
    hashed = kind in (set, frozenset)

    def build(items: Any = ()) -> Any:
        if not isinstance(items, SEQUENCES):
            return Placeholder(f"a {kind.__name__} of what is not read")
        return kind(_hashable(i) if hashed else i for i in items)

    return build


def _bytes(text: Any = "", encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise ValueError("it is damaged (bytes of an unknown encoding)")
    return text.encode("latin1")


def _dtype(name: Any, *_: Any) -> Any:
    if isinstance(name, str) and DTYPE.fullmatch(name):
        return _Builder(np.dtype(name), _set_byte_order)
    return Placeholder("numpy.dtype of objects")


def _set_byte_order(dtype: Any, state: tuple[Any, ...]) -> Any:
    """Set the byte order of a dtype; its state is (version, order, ...)."""
    return dtype.newbyteorder(state[1]) if state[1] in ("<", ">") else dtype


def _build_array(data: Any, dtype: Any, shape: Any, order: Any) -> Any:
    """Build an array from bytes.

    Raises: ValueError if their number does not fit its shape.
    """
    if not isinstance(dtype, np.dtype):
        return Placeholder("numpy.ndarray of objects")
    raw = data.encode("latin1") if isinstance(data, str) else data
    sizes = shape if type(shape) is tuple and all(type(n) is int and n >= 0 for n in shape) else ()
    if (
        not isinstance(raw, bytes)
        or len(sizes) > MAX_DIMENSIONS
        or math.prod(sizes) * dtype.itemsize != len(raw)
    ):
        raise ValueError("it is damaged (an array does not have the size that it declares)")
    return np.frombuffer(raw, dtype).reshape(sizes, order="F" if order in (True, "F") else "C")


def _array_from_state(_: Any, state: tuple[Any, ...]) -> Any:
    _, shape, dtype, fortran, data = state
    return _build_array(data, dtype, shape, fortran)


def _numpy_scalar(dtype: Any, data: Any = b"") -> Any:
    array = _build_array(data, dtype, (), "C")
    return array if isinstance(array, Placeholder) else array.item()


PLAIN_CONSTRUCTORS: dict[str, Any] = {
    "collections.OrderedDict": _mapping,
    "collections.Counter": _mapping,
    "collections.defaultdict": lambda *_: {},
    "_codecs.encode": _bytes,
    **{
        f"{module}.{kind.__name__}": _sequence(kind)
        for module in ("builtins", "__builtin__")
        for kind in (list, tuple, set, frozenset)
    },
    **{f"{module}.dict": _mapping for module in ("builtins", "__builtin__")},
    "numpy.dtype": _dtype,
    **{
        f"numpy.{core}.{name}": build
        for core in ("core", "_core")
        for name, build in {
            "multiarray._reconstruct": lambda *_: _Builder(None, _array_from_state),
            "multiarray.scalar": _numpy_scalar,
            "numeric._frombuffer": _build_array,
        }.items()
    },
}

Unpickler.dispatch |= {
    getattr(pickle, name)[0]: method
    for name, method in {
        "GLOBAL": Unpickler._global,
        "STACK_GLOBAL": Unpickler._stack_global,
        "INST": Unpickler._instance,
        "OBJ": Unpickler._object,
        "REDUCE": Unpickler._reduce,
        "NEWOBJ": Unpickler._reduce,
        "NEWOBJ_EX": Unpickler._new_object_with_keywords,
        "BUILD": Unpickler._build,
        "APPEND": Unpickler._append_one,
        "APPENDS": Unpickler._append_many,
        "LIST": Unpickler._list,
        "DICT": Unpickler._dict,
        "SETITEM": Unpickler._set_one,
        "SETITEMS": Unpickler._set_many,
        "ADDITEMS": Unpickler._add_items,
        "FROZENSET": Unpickler._frozen_set,
        "BYTEARRAY8": Unpickler._bytearray,
    }.items()
}
