"""Reinforcement learning of an adapter with rewards that a program checks."""
