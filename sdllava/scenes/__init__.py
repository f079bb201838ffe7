"""The rendered world of the miniature: objects, renderer, language and datasets."""
