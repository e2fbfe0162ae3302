"""MCAR: a global stream, a parameter-free region module and a local stream for multi-label image recognition."""

__version__ = "0.1.0"
