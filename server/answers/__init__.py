"""From the engine's events to OpenAI's chunks, and from chunks to whole answers: one path for both."""
