"""A language model from the Hub, fine-tuned on conversations; see `README.md`."""
