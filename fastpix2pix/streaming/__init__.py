"""Video: decode, translate through the frame runtime, encode; files, cameras, networks, pipes."""
