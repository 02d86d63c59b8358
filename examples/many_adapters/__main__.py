"""`python -m examples.many_adapters` runs the whole example; `--help` lists flags."""

from .train import main

main()
