"""This library against vectors that another engine wrote."""
