"""Attention that reads pages where they lie: what GPUs run."""
