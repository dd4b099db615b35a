"""The command `byrote`, one file a verb."""
