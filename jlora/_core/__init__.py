"""The verbs of the flow: split, apply, merge, extract, and the algebra of factors.

May import the vocabulary, `methods`, `transform` and `_plan`.
"""
