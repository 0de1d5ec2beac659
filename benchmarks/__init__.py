"""Benchmarks: each prints its figure, a hand-written SQL loop's from the same run, and the ratio.

Run ``python -m benchmarks --help``.  Absolute figures belong to one machine; the ratio
is what a change is judged by.  Every result is stored, in ours and in the loop alike.
"""
