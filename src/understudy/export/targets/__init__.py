"""One module an export target: makes the files of one runtime."""
