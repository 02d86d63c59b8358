"""jlora beside other LoRA libraries, each in an environment of its own."""
