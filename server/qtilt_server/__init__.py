"""The qtilt server: vLLM with guided decoding behind the OpenAI routes."""
