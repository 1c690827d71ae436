"""Guidance inside vLLM: the only package here that imports vllm (see processor.py and worker_extension.py)."""
