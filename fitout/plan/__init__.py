"""THE PLAN. Memory and time before the run; says what fits, which term is too big and what to turn.

Here: what a run computes (work), the machine or card it would run on (machine), bytes and seconds by formula
(estimate), the table of methods and the choice for `method: auto` (planner), how far past plans were off (history).
Not here: what a method trains and keeps (model.methods.cost), a model's sizes (model.shape). No weights are loaded.
"""
