"""The real server in a process of its own, over tiny models made on the spot."""
