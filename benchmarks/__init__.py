"""BENCHMARKS. Fitout and a peer on the same work, in turn; the protocol is in README.md."""
