"""For tests that run the real vLLM: tiny models, an engine driven step by step, an oracle that knows none of qtilt."""
