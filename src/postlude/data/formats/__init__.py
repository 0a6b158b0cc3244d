"""Formats: how a record is read as examples. Each file here is one format, or what several have in common."""
