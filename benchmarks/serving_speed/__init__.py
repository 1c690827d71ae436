"""The parts of `benchmarks/serving.py`: what is run, by which systems, and what the least possible cost is."""
