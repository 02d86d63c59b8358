"""Faults made on purpose: seeded scripts, each of which answers one question."""
