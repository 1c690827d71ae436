"""The value model, and the directory it is kept in."""
