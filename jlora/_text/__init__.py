"""Text from anyone, read in bounded time: globs, regular expressions, JSON.

May import `_tables` and `errors`.
"""
