"""What a run tells: typed events, metrics and losses on their way to the run directory and to sinks, readings of
the hardware, and what is shown on the terminal."""
