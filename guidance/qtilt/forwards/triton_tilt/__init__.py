"""The tilt's passes over the vocabulary in Triton: what GPUs run."""
