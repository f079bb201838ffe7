"""Research code around the package. Not in the wheel."""
