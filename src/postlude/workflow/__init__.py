"""The commands' logic: the graph of stages, and what can be asked of runs and models."""
