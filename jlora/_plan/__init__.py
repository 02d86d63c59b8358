"""Makes a `Plan` from a config and one abstract trace; shows and writes plans.

May import the vocabulary, `methods` and `transform`.
"""
