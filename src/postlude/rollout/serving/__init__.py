"""Engines in processes of their own: how they are started, given weights, asked and ended."""
