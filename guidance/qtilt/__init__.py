"""Q♯ guidance: a small value model tilts a reference policy, token by token (arXiv 2502.20548).

The package is imported by name and module (``from qtilt.tilt import tilt``); importing ``qtilt`` itself loads nothing,
so the API process and the trainer's command line stay light.
"""

__version__ = "0.1.0"
