"""The `evaluate` module in this folder: `evaluate.load(str(metric_path()), "mmvp")`."""
