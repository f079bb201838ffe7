"""The rendered scenes of the miniature: world, renderer, language and dataset, one module each."""
