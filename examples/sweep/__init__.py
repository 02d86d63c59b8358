"""Learning rates × ranks in one program on MiniLM; see README.md."""
