"""Decode pickles without importing or calling anything that they name.

A pickle is a program for a small machine, and the standard library's machine calls whatever global
the program names. This one has no import and no call: it knows a fixed table of constructors for
plain containers, tensors and NumPy arrays, written here, and every other global becomes an inert
:class:`Placeholder`. So the safety does not depend on a list of dangerous names, and files that
hold harmless objects of unknown classes (a config, a logger) can be read for their tensors.

Guarded as well: dict keys whose hash takes exponential time, and sizes that are only declared.
"""

import math
import pickle
import re
from collections.abc import Callable, Mapping
from io import BytesIO
from typing import Any, ClassVar

import numpy as np

from .raw import first_line

# Objects of these modules have no place among weights and are what attacks are made of. They would
# be inert as well; the file is refused because its owner should know.
HOSTILE_MODULES = (
    *("os", "posix", "nt", "subprocess", "sys", "socket", "shutil", "runpy", "importlib"),
    *("ctypes", "pty", "pdb", "timeit", "webbrowser", "pip"),
)
HOSTILE_BUILTINS = (
    *("eval", "exec", "execfile", "compile", "open", "file", "__import__", "input", "breakpoint"),
)
BUILTINS = ("builtins", "__builtin__", "io", "_io")
# What a program may build: this many bytes or items for each of its bytes, and some for short ones.
MAX_GROWTH, MIN_BUDGET = 20, 1 << 20
MAX_DIMENSIONS = 64
# Numbers and text of fixed size; an object dtype would be unpickled in turn.
DTYPE = re.compile(r"[<>|=]?([biufc?]\d{0,2}|[SU]\d{1,4})")
SEQUENCES = (list, tuple, set, frozenset, dict)
Scalar = str | int | float | complex | bool | bytes | None

# What the standard machine may do by itself: push plain values, arrange the stack, keep a memo.
_PLAIN = """
PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWFALSE NEWTRUE INT BININT BININT1 BININT2 LONG LONG1
LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 UNICODE
BINUNICODE SHORT_BINUNICODE BINUNICODE8 TUPLE EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST EMPTY_DICT
EMPTY_SET GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE BINPERSID
"""


class Placeholder:
    """Stand for an object of a class that is never imported, and ignore what is done to it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"<{self.name}, left out>"


class Constructor:
    """Wrap a function of ours that a pickle may ask for; nothing can be set on it from there."""

    __slots__ = ("build", "name")

    def __init__(self, name: str, build: Callable[..., Any]) -> None:
        self.name = name
        self.build = build


class _Builder:
    """Stand for an array or a dtype whose state, given as a tuple, comes later in the program."""

    def __init__(self, value: Any, set_state: Callable[[Any, Any], Any]) -> None:
        self.value = value
        self.set_state = set_state


class Unpickler(pickle._Unpickler):
    """The standard library's machine in Python, its importing and calling instructions replaced.

    Args:
        data: one pickle.
        constructors: module.name -> function or constant, in addition to the plain ones.
        storage: called with the persistent ids, which torch.save uses for its storages.
    Attributes:
        ignored: names of the globals that became placeholders, in the order of their appearance.
    """

    # Of the class in the standard library.
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
        # Python 2 wrote bytes as text; a file in memory gives what it has, whatever is asked for.
        super().__init__(BytesIO(data), encoding="latin1")
        self._constructors = {**PLAIN_CONSTRUCTORS, **(constructors or {})}
        self._storage = storage
        self.ignored: dict[str, None] = {}
        # A memo lets a small program copy something large again and again.
        self._budget = MAX_GROWTH * len(data) + MIN_BUDGET

    def decode(self) -> Any:
        """Return the content: plain containers, arrays, what the constructors give, placeholders.

        Raises: ValueError if the pickle is damaged, or asks for functions that no weights need.
        """
        try:
            return _finished(self.load())
        except ValueError:
            raise
        except Exception as error:  # a damaged program can do anything but run
            kind = type(error).__name__
            raise ValueError(f"it is cut off or damaged ({kind}: {first_line(error)})") from None

    def persistent_load(self, pid: Any) -> Any:
        """Return the storage that torch.save refers to."""
        if self._storage is None:
            raise ValueError("it refers to data outside it")
        return self._storage(pid)

    def find_class(self, module: str, name: str) -> Any:
        """Return a constructor, a constant or a placeholder; never what the name stands for."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("it names a global by something else than text")
        full = "".join(c if c.isprintable() else "?" for c in f"{module}.{name}"[:200])
        known = self._constructors.get(full)
        if known is not None:
            return Constructor(full, known) if callable(known) else known
        if module.partition(".")[0] in HOSTILE_MODULES or (
            module in BUILTINS and name in HOSTILE_BUILTINS
        ):
            raise ValueError(f"it asks for {full[:80]}, which no weights need: do not trust it")
        self.ignored[full] = None
        return Placeholder(full)

    def _construct(self, function: Any, arguments: Any) -> Any:
        if isinstance(function, Constructor):
            if type(arguments) is not tuple:
                raise ValueError("it is damaged (a constructor without arguments)")
            built = function.build(*(_finished(argument) for argument in arguments))
            self._spend(built)
            return built
        return Placeholder(getattr(function, "name", "an object"))

    def _spend(self, built: Any) -> None:
        """Count what the program builds.

        Raises: ValueError if it is far more than the program holds.
        """
        if isinstance(built, np.ndarray):
            self._budget -= built.nbytes
        elif isinstance(built, (str, bytes, *SEQUENCES)):
            self._budget -= len(built)
        if self._budget < 0:
            raise ValueError("it grows beyond all measure when it is read")

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
                raise ValueError("it is damaged (the state of an array is none)")
            target.value = target.set_state(target.value, tuple(_finished(s) for s in state))
            self._spend(target.value)

    def _append_one(self) -> None:
        value = _finished(self.stack.pop())
        if type(self.stack[-1]) is list:
            self.stack[-1].append(value)

    def _append_many(self) -> None:
        values = [_finished(value) for value in self.pop_mark()]
        if type(self.stack[-1]) is list:
            self.stack[-1].extend(values)

    def _list(self) -> None:
        # Reading up to the mark gives `append` another stack.
        items = self.pop_mark()
        self.append([_finished(value) for value in items])

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
                self.stack[-1][_hashable(key)] = _finished(value)

    def _add_items(self) -> None:
        items = self.pop_mark()
        if type(self.stack[-1]) is set:
            self.stack[-1].update(_hashable(item) for item in items)

    def _frozen_set(self) -> None:
        items = self.pop_mark()
        self.append(frozenset(_hashable(item) for item in items))

    def _bytearray(self) -> None:
        self.append(self.read(int.from_bytes(self.read(8), "little")))


def _finished(value: Any) -> Any:
    """Return the array or dtype where a builder stands for it."""
    return value.value if isinstance(value, _Builder) else value


def _hashable(key: Any) -> Any:
    """Return a key that is hashed in no time: text, numbers, a flat tuple; others by identity."""
    flat = key if type(key) is tuple else (key,)
    return key if all(isinstance(k, Scalar | Placeholder) for k in flat) else Placeholder("a key")


def _mapping(items: Any = (), *_: Any) -> Any:
    """Build the dict types, from another one or from pairs."""
    pairs = items.items() if type(items) is dict else items
    if not isinstance(items, SEQUENCES):
        return Placeholder("a dict of what is left out")
    return {_hashable(key): value for key, value in pairs}


def _sequence(kind: Callable[[Any], Any]) -> Callable[..., Any]:
    """Return the builder of a list, tuple or set from items that are in the file.

    Of anything else it builds nothing: an expanded tensor would be endless.
    """
    hashed = kind in (set, frozenset)

    def build(items: Any = ()) -> Any:
        if not isinstance(items, SEQUENCES):
            return Placeholder(f"a {kind.__name__} of what is left out")
        return kind(_hashable(i) if hashed else i for i in items)

    return build


def _bytes(text: Any = "", encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise ValueError("it is damaged (bytes of an unknown encoding)")
    return text.encode("latin1")


def _dtype(name: Any, *_: Any) -> Any:
    if isinstance(name, str) and DTYPE.fullmatch(name):
        return _Builder(np.dtype(name), _ordered)
    return Placeholder("numpy.dtype of objects")


def _ordered(dtype: Any, state: tuple[Any, ...]) -> Any:
    """Set the byte order of a dtype; its state is (version, order, ...)."""
    return dtype.newbyteorder(state[1]) if state[1] in ("<", ">") else dtype


def _array_of(data: Any, dtype: Any, shape: Any, order: Any) -> Any:
    """Build an array from bytes, after comparing its shape with them."""
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


def _array_of_state(_: Any, state: tuple[Any, ...]) -> Any:
    _, shape, dtype, fortran, data = state
    return _array_of(data, dtype, shape, fortran)


def _numpy_scalar(dtype: Any, data: Any = b"") -> Any:
    array = _array_of(data, dtype, (), "C")
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
            "multiarray._reconstruct": lambda *_: _Builder(None, _array_of_state),
            "multiarray.scalar": _numpy_scalar,
            "numeric._frombuffer": _array_of,
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
