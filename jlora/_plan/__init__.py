"""From intent and one abstract trace to a `Plan`, and how a plan is shown and written.

May import the vocabulary, `methods` and `transform`.
"""
