"""Training: recipes, stages, collator, cached features, and the `train`, `merge` and `cache` commands."""
