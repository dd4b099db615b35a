"""The scaling laws of DLCM, fitted to runs."""
