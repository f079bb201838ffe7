"""What the diffusion model sees: attention, features, similarity (S3, sections 3 and 4, appendices C and D).

Numbers come first, as arrays and dataclasses; `plots` draws them.
"""
