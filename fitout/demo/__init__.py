"""The embedded default: a small, really pretrained base model, a small messy data set, and the code that made both.

Here live the miniature world (`world`), the text that tells it (`corpus`), the tokenizer (`tokenizer`), the instruction
data (`instructions`, `data/`), the retention probes (`probes`) and `make`, which writes them all again. How a model is
trained, evaluated or served lives elsewhere: the demo only supplies what it is done with.
"""
