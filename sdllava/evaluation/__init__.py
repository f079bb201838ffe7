"""The papers' benchmarks, caption metrics, image-text matching and leakage; running, storing and comparing evaluations.

Uses models, processors and data through their public interfaces. Does not import training.
"""
