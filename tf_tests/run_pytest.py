"""Runs pytest on the files named on the command line: the main program of the Bazel tests."""

import sys

import pytest

if __name__ == "__main__":
    sys.exit(pytest.main(["-m", "", "-p", "no:cacheprovider", *sys.argv[1:]]))
