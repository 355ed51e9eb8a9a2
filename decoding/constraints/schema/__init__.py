"""JSON Schema to grammar: exact, or refused by name."""
