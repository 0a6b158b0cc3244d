"""Where nodes come from: one provider a file."""
