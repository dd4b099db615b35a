"""byrote: language models that look things up instead of working them out."""
