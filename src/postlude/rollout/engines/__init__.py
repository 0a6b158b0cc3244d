"""What a manifest may say of the engines that answer prompts, one a file."""
