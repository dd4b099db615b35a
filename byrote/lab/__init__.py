"""Measuring, comparing and looking inside."""
