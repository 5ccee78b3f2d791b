"""Fitout: fine-tune a pretrained language model with labelled data, end to end, with evidence at every step."""

__version__ = "0.1.0"
