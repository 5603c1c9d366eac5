"""What units of work cost: run `make bench`, or `python -m benchmarks --help`."""
