"""`python -m examples.chat` runs the whole example; `--help` lists flags."""

from .train import main

main()
