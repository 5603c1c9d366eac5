"""``sessionscope doctor``: what is wrong with a Database where it runs, and what mends it."""
