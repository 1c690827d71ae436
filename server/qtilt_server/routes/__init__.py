"""The HTTP routes; each file attaches its own."""
