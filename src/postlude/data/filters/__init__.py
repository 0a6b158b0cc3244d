"""Filters: which records are left out, and why. Each file here is one filter, or what several have in common."""
