"""The demo page: questions about an image, attention maps of their words, and their effect on the features."""
