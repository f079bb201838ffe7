"""Training the miniature from scratch, and its study of the papers' tables."""
