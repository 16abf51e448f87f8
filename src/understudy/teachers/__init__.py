"""Teachers: their outputs computed fast, stored exactly, and read back per view."""
