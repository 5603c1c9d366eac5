"""``sessionscope doctor``: what is wrong with a Database where it runs, and what mends it."""

from sessionscope.doctor._command import doctor

__all__ = ["doctor"]
