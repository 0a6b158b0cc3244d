"""The fused language-model head, and one loss a file."""
