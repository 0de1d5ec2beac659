"""An index of Python source code: what is defined where.

The parts, in the order of reading: ``library`` says which files there are,
``parsing`` what is in one of them, ``models`` what is kept, ``tasks`` do the
work in the background, ``views`` show the index and schedule a file.
"""
