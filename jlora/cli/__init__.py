"""The `jlora` command: look at adapters, merge, quantise, convert, compare.

A thin layer: each command calls the functions of the same name. May import everything.
"""

from ._main import main as main, run as run
