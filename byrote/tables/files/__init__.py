"""Tables as bytes on disk: formats, headers, reads, checksums."""
