"""Context-free grammars, their incremental parser, and the shortest way to complete a text."""
