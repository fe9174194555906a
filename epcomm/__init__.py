"""Expert-parallel dispatch and combine for Mixture-of-Experts models."""

from .version import __version__

__all__ = ["__version__"]
