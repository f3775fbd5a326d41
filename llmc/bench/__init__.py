"""`llmc bench`: what an artifact, a level or a running server does on this machine, measured with its baseline in the same run."""
