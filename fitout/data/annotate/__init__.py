"""ANNOTATION. What people said in an annotation tool, as data; and the tools' servers: push tasks, pull answers.

Here live the form every tool's answers are brought to (annotation), how far annotators agree and what makes one answer
of several (agreement), each tool's own words (label_studio, doccano), and the wire (http). What a row of an exported
file means as a sample is decided in `data/formats`.
"""
