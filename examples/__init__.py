"""Runnable examples of jlora; `python -m examples.<name>` from a clone."""
