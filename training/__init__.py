"""How a head is trained: recipe, loop, run, checkpoint, report."""
