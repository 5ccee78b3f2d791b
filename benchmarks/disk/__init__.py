"""What a bad disk does to a run: failing operations, lost power, flipped bits. One command each, see README.md."""
