"""What the demos share: serve a reference with the real server, run the loop against it, collect the results."""
