"""Looks through a pickle, step by step, before it is run: what it would take of time and memory, and what it hashes.

A tuple that holds a tuple twice, which holds one twice, and so on sixty times, is a few hundred bytes and is hashed, or
written as text, for years; numbers chosen with the same hash make a dict slow. So only names and small numbers may be
keys of dicts and members of sets.
"""

import pickle
import pickletools
from typing import Any

_MOST_STEPS = 1_000_000  # of a pickle: some seconds to look through
# Steps that no checkpoint has: they reserve memory by a number alone, or take objects from elsewhere.
_UNKNOWN = {"BYTEARRAY8", "NEXT_BUFFER", "READONLY_BUFFER", "EXT1", "EXT2", "EXT4", "LONG4"}
# Steps whose objects may be keys, and the largest number among them
_TEXTS = {"UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING"}
_KEYS = _TEXTS | {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "NONE", "NEWTRUE", "NEWFALSE"}
_MOST_KEY = 2**60
# Of the objects that a step takes, those that it hashes
_HASHED = {
    "SETITEM": slice(1, 2),
    "SETITEMS": slice(1, None, 2),
    "DICT": slice(0, None, 2),
    "ADDITEMS": slice(1, None),
    "FROZENSET": slice(0, None),
}
_PUT, _GET = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}, {"GET", "BINGET", "LONG_BINGET"}


def _effect(step: pickletools.OpcodeInfo) -> tuple[bool, int, int]:
    """Whether a step takes all objects above the last mark; how many it takes besides; how many it leaves."""
    before = step.stack_before
    to_mark = pickletools.markobject in before
    return to_mark, before.index(pickletools.markobject) if to_mark else len(before), len(step.stack_after)


_EFFECTS = {step.name: _effect(step) for step in pickletools.opcodes}


def check_steps(file: Any) -> None:
    """Looks through the next pickle of a file (or a memory map), and goes back to where it begins.

    Raises:
      UnpicklingError: it is long beyond reason, or would take memory that is not in proportion to its size: the
        unpickler's table of objects is as long as the largest number that a step gives one. Or it has a key, or a
        member of a set, that is neither a name nor a number.
    """
    start = file.tell()
    # The unpickler's stack, marks in it, and table of objects; of each object only whether it may be a key. All in one
    # function: a call for each step takes as long as the step.
    objects: list[bool] = []
    marks: list[int] = []
    table: dict[int, bool] = {}
    for n, (step, argument, _) in enumerate(pickletools.genops(file)):
        name = step.name
        if name in _UNKNOWN:
            raise pickle.UnpicklingError(f"a step {name}")
        place = len(table) if argument is None else argument
        if n > _MOST_STEPS or (name in _PUT and int(place) > n):
            raise pickle.UnpicklingError("more objects than a checkpoint has")
        if name in _GET and int(place) not in table:
            raise pickle.UnpicklingError("an object that is not there")
        floor = marks[-1] if marks else 0
        if name == "MARK":
            marks.append(len(objects))
            continue
        if name == "POP" and marks and floor == len(objects):
            marks.pop()
            continue
        to_mark, count, leaves = _EFFECTS[name]
        if to_mark:
            if not marks:
                raise pickle.UnpicklingError("a mark that is not there")
            count += len(objects) - marks.pop()
            floor = marks[-1] if marks else 0
        if count > len(objects) - floor or (name in _PUT and floor == len(objects)):
            raise pickle.UnpicklingError("an object that is not there")
        if name in _HASHED and not all(objects[len(objects) - count :][_HASHED[name]]):
            raise pickle.UnpicklingError("a key that is neither a name nor a number")
        if name in _PUT:
            table[int(place)] = objects[-1]
        elif name in _GET:
            objects.append(table[int(place)])
        elif name == "DUP":
            objects.append(objects[-1])
        else:
            del objects[len(objects) - count :]
            if leaves:
                objects.append(name in _KEYS and (name != "LONG1" or abs(argument) < _MOST_KEY))
    file.seek(start)
