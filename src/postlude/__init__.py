"""Postlude: post-training for large language models from one manifest."""

__version__ = "0.1.0"
