"""THE PLAN. Memory and time before the run; says what fits, which term is too big and what to turn.

Here: what a run computes (work), the machine or card it would run on (machine), bytes by formula and seconds by
arithmetic on rates (estimate), seconds found by trying some micro-batches (rehearsal), the table of methods and the
choice for `method: auto` (planner), how far past plans were off (history).
Not here: what a method trains and keeps (model.methods.cost), a model's sizes (model.shape). No weights are loaded.
"""


def duration(seconds: float) -> str:
    """Short, in the unit that suits."""
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
