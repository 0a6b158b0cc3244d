"""Trackers that metrics are sent to, one file each."""
