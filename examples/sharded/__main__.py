"""`python -m examples.sharded` runs the whole example; `--help` lists the flags."""

from .train import main

main()
