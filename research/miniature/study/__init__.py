"""The papers' tables on the miniature's parts: measured part by part, written as one page."""
