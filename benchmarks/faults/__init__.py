"""One kind of fault a script: seeded, bounded in time, and anyone can run it again."""
