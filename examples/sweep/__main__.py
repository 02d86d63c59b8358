"""`python -m examples.sweep` runs the sweep; `--help` lists the flags."""

from .sweep import main

main()
