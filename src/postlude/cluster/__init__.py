"""Where processes run. ``local`` starts the ranks of a stage on this machine."""
