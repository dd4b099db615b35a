"""Where rows live: one file a placement, and wrappers around any of them."""
