"""Studies of many runs: what is planned, run and reported."""
