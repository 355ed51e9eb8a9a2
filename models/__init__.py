"""The loader: where weights come from, their precision, and what the engine needs to know of them."""
