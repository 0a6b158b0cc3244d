"""Models: transformers' own classes, loaded, given document attention, verified and exported."""
