"""Data for training and analysis: sources of samples, records of messages and images, and diffusion prompts."""
