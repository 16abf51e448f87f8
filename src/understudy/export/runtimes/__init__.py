"""One script a runtime: opens its files with NumPy and its own package alone."""
