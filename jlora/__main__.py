"""`python -m jlora` is the `jlora` command."""

from .cli import main

if __name__ == "__main__":
    main()
