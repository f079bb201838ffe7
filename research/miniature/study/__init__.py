"""The papers' tables in small, on the miniature's parts: measured part by part, written as one page."""
