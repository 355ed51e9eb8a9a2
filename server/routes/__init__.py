"""One function per URL: read the body, ask the engine, answer."""
