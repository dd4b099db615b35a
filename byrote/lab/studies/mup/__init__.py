"""Does decoupled muP hold for a DLCM?"""
