"""The decoding engine: scheduler, KV cache, model runner, sampling, strategies. It knows nothing of HTTP."""
