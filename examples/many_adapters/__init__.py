"""Three adapters in one sweep, one batch that uses all of them; see README.md."""
