"""HTML pages about runs: self-contained, with their pictures inside."""
