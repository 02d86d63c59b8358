"""What came before LoRA, and what LoRA learns: methods and settings, measured."""
