"""Sources: where records come from. Each file here is one kind of source, or one kind of file."""
