"""vLLM's Model Runner V2."""
