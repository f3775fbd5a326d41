"""SHA-256 of many messages at once: `cpu/sha256.cpp`. No op of a graph; the runtime hashes an artifact's weights with it."""
