"""Objects of Python's library, and of other libraries: which of them hold values of the user's, and where.

stop = threading.Event()            # self.stop.is_set() reads stop._flag
ratio = multiprocessing.Value("d")  # self.ratio.value reads memory of ctypes
"""

from __future__ import annotations

import ctypes
import functools
import queue
import sys
import threading
import weakref
from array import array
from collections import ChainMap, UserDict, UserList
from typing import Any

import numpy as np

_INSIDES: dict[type, tuple[str, ...]] = {
    UserDict: ("data",),
    UserList: ("data",),
    ChainMap: ("maps",),
    weakref.WeakKeyDictionary: ("data",),
    weakref.WeakValueDictionary: ("data",),
    weakref.WeakSet: ("data",),
    queue.Queue: ("queue",),
    threading.Event: ("_flag",),
    threading.Semaphore: ("_value",),
}
"""Classes of Python's library that hold the user's values, and in which attributes."""

_SIMPLE: Any = ctypes.c_int.__mro__[1]
"""The class of all plain numbers of ctypes, which has no public name."""

MEMORY = (np.ndarray, bytearray, array, ctypes.Array, ctypes.Structure, _SIMPLE)
"""Classes whose objects are memory."""

_OPEN_LIBRARY = frozenset(
    {"types", "argparse", "collections", "dataclasses", "functools", "queue", "typing", "weakref"}
)
"""Modules of Python's library whose objects are mere containers of the user's values."""

_SHARED = "multiprocessing.sharedctypes"


def insides(value: Any) -> tuple[str, ...]:
    """The attributes in which an object of Python's library holds the user's values."""
    if type(value).__module__ == _SHARED:
        return ("_obj",)
    return next((names for kind, names in _INSIDES.items() if isinstance(value, kind)), ())


@functools.cache
def opens(cls: type) -> bool:
    """Whether objects of a class are the user's: those of torch and of Python's library keep nothing of a model.

    What a thread holds changes beside every call (the clock of a progress bar's monitor), and no call is to blame.
    """
    if issubclass(cls, (threading.local, threading.Event, threading.Semaphore)) or cls.__module__ == _SHARED:
        return True
    if issubclass(cls, threading.Thread):
        return False
    root = cls.__module__.partition(".")[0]
    if root in ("torch", "numpy", "shardc", "builtins"):
        return False
    return root not in sys.stdlib_module_names or root in _OPEN_LIBRARY or root == "__main__"
