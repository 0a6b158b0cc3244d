"""Adapters: what is trained is small, the base is frozen, and an artifact holds the one and names the other.

PEFT puts the layers in; its file format is that of the artifact, so that anything that knows PEFT loads it. What is
ours is where the weights come from (drawn by name, equal on every mesh), which base they belong to (by the hash of its
files), and the merging, which rounds once.
"""
