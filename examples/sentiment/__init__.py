"""MiniLM-L6 learns the sentiment of review sentences with LoRA."""
