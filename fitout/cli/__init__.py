"""The command line: it parses and draws; the verbs do the work."""
