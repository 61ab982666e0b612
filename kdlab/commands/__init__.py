"""One module per group of commands; whatever is slow to import is imported by the function that needs it."""
