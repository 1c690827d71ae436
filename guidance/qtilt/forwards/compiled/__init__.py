"""What runs as C++ on CPUs in float32: a step there waits for calls and memory, not for arithmetic.

``library`` compiles and loads it, ``llama_forward`` runs backbones on it. The rest of it is selected where it is
defined in Python (tilt.py).
"""
