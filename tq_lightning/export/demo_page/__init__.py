"""A page of static files that runs a packed file in a browser, at any width."""
