"""Storage and energy of a model at every width, computed without running it."""
