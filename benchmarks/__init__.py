"""One script for each measured claim. `python benchmarks/NAME.py` prints a table and one ratio."""
