"""Data sets: classes, official splits, groups of clips, and what is wrong with them."""
