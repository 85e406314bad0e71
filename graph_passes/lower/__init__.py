"""From the portable form to a target's own operators, one target family a file; imports what ``graph_passes`` may."""
