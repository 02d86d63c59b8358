"""`python -m examples.earlier_methods TABLE` trains a table's rows; see README.md."""

from .train import main

main()
