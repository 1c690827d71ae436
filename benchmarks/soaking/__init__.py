"""Parts of soak.py: what clients ask, how they behave, what is checked."""
