"""System checks of ``FIREFLY_JOBS`` and of the database it points at."""
