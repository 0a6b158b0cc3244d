"""Reward functions, one in a file."""
