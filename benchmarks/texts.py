"""Text that is on every machine: the Python standard library's own source."""

import glob
import os
import pathlib

import numpy as np


def sources():
    """The texts of the standard library's modules, in the order of their names."""
    paths = sorted(glob.glob(os.path.join(os.path.dirname(os.__file__), "*.py")))
    return [pathlib.Path(path).read_text(encoding="utf-8", errors="ignore") for path in paths]


def codes(texts):
    """Texts as arrays of numbers, one for each character, and how many different ones there are."""
    alphabet = {character: i for i, character in enumerate(sorted(set("".join(texts))))}
    return [np.array([alphabet[c] for c in text], "int32") for text in texts], len(alphabet)


def windows(text, starts, length):
    """Inputs and targets: `length` characters from each start, and those that follow each of them."""
    found = text[np.asarray(starts)[:, None] + np.arange(length + 1)]
    return found[:, :-1], found[:, 1:]
