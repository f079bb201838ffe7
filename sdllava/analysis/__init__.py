"""Analysis of the diffusion features: attention, feature maps, similarity (S3, sections 3 and 4, appendices C and D).

Results are arrays and dataclasses; `plots` draws them.
"""
