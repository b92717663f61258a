"""One file a family; each says only what differs from the common decoder."""
