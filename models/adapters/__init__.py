"""LoRA adapters as PEFT writes them: read, checked against the model, and brought into one form. Knows no requests."""
