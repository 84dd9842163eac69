"""From objects to slides: the only place where positions, counts, features and images come together."""

from spatiaflow._slides.gather import check_together, gather

__all__ = ["check_together", "gather"]
