"""`python -m examples.policy` runs the example; `--help` lists the flags."""

from .train import main

main()
