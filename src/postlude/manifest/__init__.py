"""The manifest: its schema, and how it is loaded, inherited, overridden and explained. Imports nothing heavy."""
