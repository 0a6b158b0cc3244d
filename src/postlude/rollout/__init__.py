"""Rollouts: prompts become completions through an engine, and rewards say how good they are."""
