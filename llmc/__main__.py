"""`python -m llmc`, the same as `llmc`."""

from llmc.cli import main

raise SystemExit(main())
