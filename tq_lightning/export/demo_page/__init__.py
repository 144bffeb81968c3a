"""Demo page: static files that run a packed file in a browser at any width."""
