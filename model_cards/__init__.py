"""Card template and recipes."""
