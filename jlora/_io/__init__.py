"""Bytes on disk: tensors, descriptions, fingerprints, models, steps; no maths.

May import the vocabulary, `methods` and `_plan`.
"""
