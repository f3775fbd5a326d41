"""Several servers of one artifact behind one address: `llmc serve --replicas N`."""
