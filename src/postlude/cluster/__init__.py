"""Where processes run: groups of workers on Ray, their placement, supervision and recovery, and transport security."""
