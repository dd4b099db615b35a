"""The crash-safe log of changed rows."""
