"""Stages: what each kind of stage does, from its configuration to its artifact."""
