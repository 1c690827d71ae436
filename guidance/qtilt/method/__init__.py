"""The mathematics: return distributions, the tilt, and what a request asks of them."""
