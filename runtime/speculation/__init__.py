"""Guesses of a draft model: a smaller artifact of the same vocabulary that runs ahead of the one that is served. See README.md."""
