"""The environments that come with the project, one a file."""
