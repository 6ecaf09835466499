"""The tests, and what they start as processes of their own."""

import gc

# What is imported and traced makes many objects, few of which are garbage: looking through them took a tenth of the time.
gc.set_threshold(20_000, 10, 10)
