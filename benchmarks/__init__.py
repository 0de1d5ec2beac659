"""Benchmarks: each prints its figure, a hand-written one from the same run, and the ratio.

Run ``python -m benchmarks --help``.  Absolute figures belong to one machine; the ratio
is what a change is judged by.  Every result is stored, in ours and in the loop alike.

``catalogue`` lists them.  One benchmark on one database is measured in a process of its
own (``worker``), which has Django set up for a database made for that run; it hands
``figures`` to the process that prints them.

To add one: a module with ``measure(run)``, a line in ``catalogue.BENCHMARKS``, and a row in
``docs/explanation/performance.md`` (a test compares the two).
"""
