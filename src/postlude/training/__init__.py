"""The trainer: it executes streams, objectives and companions, and never knows which recipe it runs."""
