"""The engines that answer prompts in online reinforcement learning, one a file."""
