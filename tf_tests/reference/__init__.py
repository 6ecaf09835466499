"""The methods once more, in NumPy and float64, written for reading rather than speed and sharing nothing with keras_ngd.

Rows are arrays `[groups, examples, positions, dim]` throughout.
"""
