"""How fast tables are, against what else there is."""
